// Host side: what the current device offers a kernel, and one way to launch, on a GPU or in the emulator.
#pragma once

#include "primitives.cuh"

#ifdef ASYMVLM_EMULATE
#include "emulator/emulator.h"
#else
#include <atomic>
#endif

namespace asymvlm {

constexpr int INVALID_VALUE = 1, NO_IMAGE = 209, TOO_LARGE = 720;  // numbers of cudaError_t, also in the emulator

struct Device {
  int processors;
  int shared;     // bytes of shared memory a block may have
  bool clusters;  // the image of the kernel that this device loads was compiled to use them
};

struct Shape {
  int blocks, threads, cluster, shared;
  bool resident;  // all blocks at once, or the launch is refused
};

#ifdef ASYMVLM_EMULATE

template <auto kernel>
int describe_device(Device* device) {
  const emulator::Settings& made_up = emulator::configured();
  *device = {made_up.processors, made_up.shared_memory, made_up.clusters};
  return 0;
}

template <auto kernel>
int resident_blocks(const Device& device, const Shape& shape, int* blocks) {
  *blocks = device.processors / shape.cluster * shape.cluster;
  return 0;
}

template <auto kernel, class Call>
int launch(const Call& call, const Shape& shape, void*) {
  return emulator::launch([](const void* parameters) { kernel(*(const Call*)parameters); }, &call, shape.blocks,
                          shape.threads, shape.cluster, shape.shared, shape.resident);
}

#else

constexpr int MOST_DEVICES = 64;

// Also the first use of a kernel: fails where the library holds no code for the device.
template <auto kernel>
int describe_device(Device* device) {
  static std::atomic<bool> known[MOST_DEVICES];
  static Device found[MOST_DEVICES];
  int number = 0, code = cudaGetDevice(&number);
  if (code) return code;
  if (number >= MOST_DEVICES) return cudaErrorInvalidDevice;
  if (!known[number].load(std::memory_order_acquire)) {
    cudaFuncAttributes attributes;
    Device fresh = {};
    code = cudaFuncGetAttributes(&attributes, (const void*)kernel);
    if (!code) code = cudaDeviceGetAttribute(&fresh.processors, cudaDevAttrMultiProcessorCount, number);
    if (!code) code = cudaDeviceGetAttribute(&fresh.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
    if (!code) {
      code = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, fresh.shared);
    }
    if (code) {
      cudaGetLastError();  // told to the caller, and not to whoever asks next
      return code;
    }
    // as HAS_CLUSTERS in team.cuh, of the architecture that this image was compiled for
    fresh.clusters = attributes.ptxVersion >= 90 && attributes.ptxVersion < 120;
    found[number] = fresh;  // two threads write the same
    known[number].store(true, std::memory_order_release);
  }
  *device = found[number];
  return 0;
}

inline void configure(const Shape& shape, void* stream, cudaLaunchAttribute (&attributes)[2],
                      cudaLaunchConfig_t* config) {
  *config = {};
  config->gridDim = dim3(shape.blocks);
  config->blockDim = dim3(shape.threads);
  config->dynamicSmemBytes = shape.shared;
  config->stream = (cudaStream_t)stream;
  config->attrs = attributes;
  if (shape.resident) {
    attributes[config->numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config->numAttrs++].val.cooperative = 1;
  }
  if (shape.cluster > 1) {
    attributes[config->numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config->numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config->numAttrs].val.clusterDim.y = 1;
    attributes[config->numAttrs++].val.clusterDim.z = 1;
  }
}

// How many blocks of this shape the device holds at once, a multiple of the cluster.
template <auto kernel>
int resident_blocks(const Device& device, const Shape& shape, int* blocks) {
  int number = 0, code = 0;
  if (shape.cluster > 1) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config;
    Shape one = shape;
    one.blocks = shape.cluster;
    one.resident = false;
    configure(one, nullptr, attributes, &config);
    code = cudaOccupancyMaxActiveClusters(&number, (const void*)kernel, &config);
    *blocks = number * shape.cluster;
  } else {
    code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&number, (const void*)kernel, shape.threads, shape.shared);
    *blocks = number * device.processors;
  }
  if (code) cudaGetLastError();
  return code;
}

template <auto kernel, class Call>
int launch(const Call& call, const Shape& shape, void* stream) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config;
  configure(shape, stream, attributes, &config);
  void* arguments[] = {(void*)&call};
  const int code = cudaLaunchKernelExC(&config, (const void*)kernel, arguments);
  if (code) cudaGetLastError();
  return code;
}

#endif

}  // namespace asymvlm
