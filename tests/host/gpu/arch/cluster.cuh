// src/arch/cluster.cuh on the emulated GPU.
#pragma once
#include "arch/barrier.cuh"

namespace fa3::arch {

inline uint32_t cluster_size() { return static_cast<uint32_t>(emulated::block->cluster.blocks.size()); }
inline void cluster_publish() { emulated::block->cluster_arrive(); }
inline void cluster_acquire() { emulated::block->cluster_wait(); }
inline void cluster_meet() {
  cluster_publish();
  cluster_acquire();
}
inline void cluster_arrive() { cluster_publish(); }
inline void cluster_wait() { cluster_acquire(); }

/// Whatever is sent arrives when the copy engine of the other block brings it.
template <class T>
void send_value(T* own, const T& value, Barrier& barrier, uint32_t rank) {
  if (rank >= cluster_size()) emulated::fail("something is sent to a block that the cluster has not");
  emulated::Block& there = *emulated::block->cluster.blocks[rank];
  there.bring([to = counterpart(there, own), value, full = counterpart(there, &barrier)] {
    *to = value;
    full->brought(sizeof value);
  });
}
inline void send(int* own, int value, Barrier& barrier, uint32_t rank) { send_value(own, value, barrier, rank); }
inline void send(float4* own, const float4& x, Barrier& barrier, uint32_t rank) { send_value(own, x, barrier, rank); }

inline void copy_to(void* there, const void* own, uint32_t bytes, Barrier& barrier, uint32_t rank) {
  emulated::Block& block = *emulated::block->cluster.blocks[rank];
  auto* const to = counterpart(block, static_cast<uint8_t*>(there));
  Barrier* const full = counterpart(block, &barrier);
  full->arrive_expecting(bytes);
  block.bring([=] {
    std::memcpy(to, own, bytes);
    full->brought(bytes);
  });
}

inline const float* in_block(const float* own, uint32_t rank) {
  return counterpart(*emulated::block->cluster.blocks[rank], own);
}

}  // namespace fa3::arch
