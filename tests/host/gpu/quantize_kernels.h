// src/kernels/quantize.cu and quantize_rotation.cu on the emulated GPU, with their dynamic shared memory. For one file
// of a library.
#pragma once
#include "cuda_runtime.h"
#include "kernels/quantize_args.h"
#include "kernels/rotation_args.h"

namespace fa3 {
namespace {
thread_local __align__(128) uint4 memory[kMaxPlacesBytes / sizeof(uint4)];
thread_local __align__(1024) uint8_t rotation_memory[emulated::kMostShared];
}  // namespace
}  // namespace fa3

template <>
struct emulated::SharedMemory<fa3::RotationArgs> {
  static uint8_t* of_thread() { return fa3::rotation_memory; }
};

#include "kernels/quantize.cu"
#include "kernels/quantize_rotation.cu"
