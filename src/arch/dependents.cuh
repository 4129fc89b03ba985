// Kernels that begin before the one in front of them in the stream has ended.
#pragma once

namespace fa3::arch {

/// Whoever is allowed to may begin, when a thread of each thread block has said so, or its block has ended.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/// Until the kernel that this one did not wait for has ended, and what it wrote is there.
__device__ __forceinline__ void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace fa3::arch
