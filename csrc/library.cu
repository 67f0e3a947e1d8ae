// Questions about the library itself: its interface, its errors, and whether the current device can run it.
#include "asymvlm.h"
#include "launch.h"

namespace asymvlm {

KERNEL(32) probe_kernel(GRID_CONSTANT int unused) { (void)unused; }

}  // namespace asymvlm

using namespace asymvlm;

ASYMVLM_API int asymvlm_interface(void) { return ASYMVLM_INTERFACE; }

ASYMVLM_API int asymvlm_struct_size(int which) {
  const int sizes[] = {sizeof(AsymvlmPrune), sizeof(AsymvlmPlan), sizeof(AsymvlmMerge), sizeof(AsymvlmMoves)};
  return which >= 0 && which < 4 ? sizes[which] : -1;
}

ASYMVLM_API int asymvlm_probe(void) {
  Device device;
  return describe_device<probe_kernel>(&device);
}

#ifdef ASYMVLM_EMULATE

ASYMVLM_API int asymvlm_emulated(void) { return 1; }

ASYMVLM_API const char* asymvlm_error_string(int code) {
  return code == 0 ? "no error" : code == TOO_LARGE ? "too many blocks in cooperative launch"
         : code == INVALID_VALUE ? "invalid argument" : emulator::last_failure();
}

ASYMVLM_API int64_t asymvlm_bytes_copied(int into_shared) { return emulator::bytes_copied(into_shared != 0); }

// The device that the tests want next.
ASYMVLM_API void asymvlm_emulate(int processors, int shared_memory, int clusters, int bulk, unsigned seed) {
  emulator::Settings settings;
  settings.processors = processors;
  settings.shared_memory = shared_memory;
  settings.clusters = clusters != 0;
  settings.bulk = bulk != 0;
  settings.seed = seed;
  emulator::configure(settings);
}

#else

ASYMVLM_API int asymvlm_emulated(void) { return 0; }
ASYMVLM_API const char* asymvlm_error_string(int code) { return cudaGetErrorString((cudaError_t)code); }

#endif
