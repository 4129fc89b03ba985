// Shared memory barriers of the copy engine and the warps, and the loads that complete on them.
#pragma once
#include <cuda.h>

#include "arch/wgmma.cuh"

namespace fa3::arch {

/// A hardware barrier. A phase ends when its arrivals and its announced bytes are all in; phases alternate in parity.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(arrivals) : "memory");
  }

  __device__ __forceinline__ void wait(uint32_t parity) {
    uint32_t over;
    do {
      asm volatile(
          "{.reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;}"
          : "=r"(over)
          : "r"(shared_address(&word)), "r"(parity)
          : "memory");
    } while (!over);
  }

  /// Whether wait() would return at once.
  __device__ __forceinline__ bool is_over(uint32_t parity) const {
    uint32_t over;
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;}"
        : "=r"(over)
        : "r"(shared_address(&word)), "r"(parity)
        : "memory");
    return over;
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&word)) : "memory");
  }

  /// Arrive at the same barrier of thread block `rank` of the cluster.
  __device__ __forceinline__ void arrive_at(uint32_t rank) {
    asm volatile(
        "{.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(shared_address(&word)),
        "r"(rank)
        : "memory");
  }

  /// Arrive, and announce what the copy engine will bring.
  __device__ __forceinline__ void arrive_expecting(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)), "r"(bytes)
                 : "memory");
  }
};

/// Order this thread's ordinary writes to shared memory before what tensor cores and the copy engine do there next.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Make initialised barriers visible to the copy engine; a barrier of the threads must follow for the others.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Fetch a map into the copy engine's cache before the first load needs it.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// One box of an operand with kAxes axes into shared memory; its bytes count on `barrier`.
template <int kAxes>
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, const int32_t (&at)[kAxes],
                                         Barrier& barrier) {
  const uint32_t to = shared_address(shared), full = shared_address(&barrier.word);
  static_assert(kAxes == 4 || kAxes == 5, "keys have four axes; queries, whose heads may share tiles, five");
  if constexpr (kAxes == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
        "%5}], [%6];" ::"r"(to),
        "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(full)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
        "%6}], [%7];" ::"r"(to),
        "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(full)
        : "memory");
  }
}

/// The same of keys, for both thread blocks of a cluster of two: into the same place of each, on its own barrier there.
__device__ __forceinline__ void load_box_for_both(void* shared, const CUtensorMap* map, const int32_t (&at)[4],
                                                  Barrier& barrier) {
  const uint16_t blocks = 0b11;
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(&barrier.word)), "h"(blocks)
      : "memory");
}

}  // namespace fa3::arch
