// Questions to CUDA about devices, pointers and streams.
#include "device.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>

#include "cuda_status.h"
#include "status.h"

namespace fa3 {

#define FA3_CUDA(call)                                       \
  do {                                                       \
    if (auto status = checked((call), #call)) return status; \
  } while (0)

DeviceScope::DeviceScope(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) {
    error = cudaSetDevice(device);
    if (error == cudaSuccess) previous_ = current;
  }
  status_ = checked(error, "cudaSetDevice");
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

namespace {

struct Abilities {
  int16_t major, minor;  // compute capability
  int32_t num_sms;       // 0: not asked yet
};

/// What a device can do never changes, and every call wants to know: CUDA is asked once.
fa3_status abilities_of(int device, Abilities& abilities) {
  constexpr int kRemembered = 64;                    // devices; those past it are asked about each time
  static std::atomic<Abilities> known[kRemembered];  // every thread that asks stores the same
  static_assert(std::atomic<Abilities>::is_always_lock_free);
  const bool remembered = device >= 0 && device < kRemembered;
  abilities = remembered ? known[device].load(std::memory_order_relaxed) : Abilities{};
  if (abilities.num_sms) return FA3_OK;
  int major = 0, minor = 0, num_sms = 0;
  FA3_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  FA3_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  FA3_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  abilities = {static_cast<int16_t>(major), static_cast<int16_t>(minor), num_sms};
  if (remembered) known[device].store(abilities, std::memory_order_relaxed);
  return FA3_OK;
}

}  // namespace

fa3_status hopper_sms(int device, int& num_sms) {
  Abilities abilities;
  if (auto status = abilities_of(device, abilities)) return status;
  if (abilities.major != 9 || abilities.minor != 0)
    return fail(FA3_ERROR_DEVICE, "device: cuda:%d has compute capability %d.%d, but fa3's kernels need 9.0 (Hopper)",
                device, abilities.major, abilities.minor);
  num_sms = abilities.num_sms;
  return FA3_OK;
}

namespace {

fa3_status count_devices(int32_t& count) {
  int driver = 0;
  count = 0;
  FA3_CUDA(cudaDriverGetVersion(&driver));
  if (driver == 0) return FA3_OK;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    count = 0;
    cudaGetLastError();  // not an error of the caller's
    return FA3_OK;
  }
  return checked(error, "cudaGetDeviceCount");
}

fa3_status query(int device, fa3_device& info) {
  cudaDeviceProp properties;
  FA3_CUDA(cudaGetDeviceProperties(&properties, device));
  info = {};
  std::snprintf(info.name, sizeof info.name, "%s", properties.name);
  info.major = properties.major;
  info.minor = properties.minor;
  info.num_sms = properties.multiProcessorCount;
  info.total_memory = properties.totalGlobalMem;
  return FA3_OK;
}

fa3_status stream_wait(cudaStream_t waiting, cudaStream_t signalling, int device) {
  const DeviceScope scope(device);
  if (scope.status()) return scope.status();
  cudaEvent_t event;
  FA3_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  cudaError_t error = cudaEventRecord(event, signalling);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(waiting, event, 0);
  cudaEventDestroy(event);  // lives on in the driver until the wait is done
  return checked(error, "cudaStreamWaitEvent");
}

fa3_status owner(const void* pointer, int& device) {
  cudaPointerAttributes attributes;
  FA3_CUDA(cudaPointerGetAttributes(&attributes, pointer));
  const bool on_device = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  device = on_device ? attributes.device : -1;
  return FA3_OK;
}

fa3_status versions(int32_t& runtime, int32_t& driver) {
  FA3_CUDA(cudaRuntimeGetVersion(&runtime));
  FA3_CUDA(cudaDriverGetVersion(&driver));
  return FA3_OK;
}

}  // namespace
}  // namespace fa3

extern "C" int fa3_device_count(int32_t* count) {
  fa3::clear_error();
  if (!count) return fa3::fail(FA3_ERROR_NULL, "count: null pointer");
  return fa3::count_devices(*count);
}

extern "C" int fa3_device_query(int32_t device, fa3_device* info) {
  fa3::clear_error();
  if (!info) return fa3::fail(FA3_ERROR_NULL, "info: null pointer");
  return fa3::query(device, *info);
}

extern "C" int fa3_versions(int32_t* runtime, int32_t* driver) {
  fa3::clear_error();
  if (!runtime || !driver) return fa3::fail(FA3_ERROR_NULL, "runtime, driver: null pointer");
  return fa3::versions(*runtime, *driver);
}

extern "C" int fa3_pointer_device(const void* pointer, int* device) {
  fa3::clear_error();
  if (!device) return fa3::fail(FA3_ERROR_NULL, "device: null pointer");
  return fa3::owner(pointer, *device);
}

extern "C" int fa3_stream_wait(void* waiting, void* signalling, int device) {
  fa3::clear_error();
  return fa3::stream_wait(static_cast<cudaStream_t>(waiting), static_cast<cudaStream_t>(signalling), device);
}
