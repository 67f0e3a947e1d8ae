// What the host code of the emulated build asks of the emulator: a device that does not exist, and launches on it.
#pragma once

#include <stdint.h>

namespace asymvlm {
namespace emulator {

struct Settings {
  int processors = 6;              // blocks resident at once, one each
  int shared_memory = 100 << 10;   // bytes a block may have
  bool clusters = true;            // teams are clusters, else they meet in L2
  bool bulk = true;                // whole rows are copied by the bulk engine, else 16 bytes by each thread
  unsigned seed = 0;               // of the order in which warps run; 0: in turn
};

void configure(const Settings& settings);
const Settings& configured();
const char* last_failure();
int64_t bytes_copied(bool into_shared);  // asynchronously, by the last launch
int launch(void (*kernel)(const void*), const void* params, int blocks, int threads, int cluster, int shared,
           bool resident);

}  // namespace emulator
}  // namespace asymvlm
