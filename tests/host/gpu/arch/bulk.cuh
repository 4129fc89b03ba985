// src/arch/bulk.cuh on the emulated GPU.
#pragma once
#include "arch/barrier.cuh"

namespace fa3::arch {

inline void load_bytes_for(emulated::Block& block, void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  if ((reinterpret_cast<uintptr_t>(global) | shared_address(shared) | bytes) % 16)
    emulated::fail("a bulk copy off 16 bytes");
  auto* const to = counterpart(block, static_cast<uint8_t*>(shared));
  Barrier* const full = counterpart(block, &barrier);
  block.bring([=] {
    std::memcpy(to, global, bytes);
    full->brought(bytes);
  });
}
inline void load_bytes(void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  load_bytes_for(*emulated::block, shared, global, bytes, barrier);
}
inline void load_bytes_for_both(void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  for (emulated::Block* block : emulated::block->cluster.blocks) load_bytes_for(*block, shared, global, bytes, barrier);
}

/// A thread's bulk groups: each is one copy, made at once or when it is waited for.
inline void add_floats(float* global, const float* shared, uint32_t bytes) {
  emulated::block->write_later([=] {
    for (uint32_t i = 0; i < bytes / sizeof(float); ++i) global[i] += shared[i];
  });
}
inline void store_floats(float* global, const float* shared, uint32_t bytes) {
  emulated::block->write_later([=] { std::memcpy(global, shared, bytes); });
}
inline void wait_until_read() { emulated::block->write_all_but(0); }
template <int kLater = 0>
void wait_until_added() {
  emulated::block->write_all_but(kLater);
}
inline void fence_async_proxy_global() {}

inline uint32_t peek(const uint32_t* state) { return *state; }
inline uint32_t claim(uint32_t* state) { return std::exchange(*state, *state ? *state : 1); }
inline void wait_for_turn(const uint32_t* turns, uint32_t turn) {
  while (*turns < turn) emulated::block->poll();
}
inline void pass_turn(uint32_t* turns) { ++*turns; }

}  // namespace fa3::arch
