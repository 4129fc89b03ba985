// CUDA's runtime for the emulated GPU: one device, whose memory is the machine's, and streams whose work is done when
// it is enqueued.
#pragma once
#include <cuda.h>

#include "emulated.h"

enum cudaError_t : int {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge
};
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
enum { cudaSharedmemCarveoutMaxShared = 100, cudaEventDisableTiming = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaMemoryType { cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };

enum cudaLaunchAttributeID {
  cudaLaunchAttributePreferredSharedMemoryCarveout,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    unsigned sharedMemCarveout;
    int cooperative, programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaDeviceProp {
  char name[64];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulated::failure.c_str() : error ? "refused by the emulated GPU" : "";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? emulated::choices.num_sms
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return device ? cudaErrorInvalidDevice : cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {"emulated GPU", 9, 0, emulated::choices.num_sms, size_t{1} << 34};
  return device ? cudaErrorInvalidDevice : cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  return *attributes = {cudaMemoryTypeDevice, 0}, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, int) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, int) { return *event = nullptr, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, int, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace emulated {
/// Where a kernel with such arguments has its dynamic shared memory, in the calling thread of the system.
template <class... Args>
struct SharedMemory {
  static uint8_t* of_thread() { return own_shared_memory(); }
};

/// Blocks that a multiprocessor has room for.
inline unsigned blocks_per_sm(const cudaLaunchConfig_t& config) {
  const unsigned by_threads = 2048 / config.blockDim.x;
  return std::min(by_threads, static_cast<unsigned>((228 << 10) / (config.dynamicSmemBytes + 1024)));
}
}  // namespace emulated

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, Kernel, const cudaLaunchConfig_t* config) {
  const unsigned most = emulated::choices.num_sms * emulated::blocks_per_sm(*config);
  return *size = static_cast<int>(std::bit_floor(std::min(most, 16u))), cudaSuccess;
}

/// As much of the grid at a time as there is room for; a cooperative one must fit, and so must a cluster.
template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Args&... args) {
  unsigned cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative;
  }
  const unsigned room = emulated::choices.num_sms * emulated::blocks_per_sm(*config);
  const unsigned blocks = config->gridDim.x * config->gridDim.y;
  if (!blocks || config->gridDim.x % cluster || config->dynamicSmemBytes > emulated::kMostShared)
    return cudaErrorInvalidValue;
  if (cluster > room || (cooperative && blocks > room)) return cudaErrorCooperativeLaunchTooLarge;
  // More at a time than these make nothing else happen: no block waits for one that comes later.
  constexpr unsigned kEnough = 16;
  const unsigned places = cooperative ? room : std::min(room, std::max(kEnough, cluster));
  const bool ended = emulated::run_grid(config->gridDim, config->blockDim.x, cluster, places,
                                        emulated::SharedMemory<Parameters...>::of_thread, [&] { kernel(args...); });
  return ended ? cudaSuccess : cudaErrorLaunchFailure;
}
