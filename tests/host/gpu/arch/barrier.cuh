// src/arch/barrier.cuh on the emulated GPU.
#pragma once
#include <cuda.h>

#include <array>

#include "arch/wgmma.cuh"
#include "emulated.h"

namespace fa3::arch {

/// As large as the hardware's.
struct Barrier {
  uint64_t arrivals : 12, missing : 12, phase : 1;
  int64_t bytes : 32;  // announced and not here yet; below 0 where they came first

  void init(int threads) {
    arrivals = missing = static_cast<uint64_t>(threads);
    phase = 0;
    bytes = 0;
  }
  void arrive() {
    if (!missing) emulated::fail("more arrivals at a barrier than it was made for");
    --missing;
    settle();
    emulated::block->pause();
  }
  void arrive_at(uint32_t rank) { counterpart(*emulated::block->cluster.blocks[rank], this)->arrive(); }
  void arrive_expecting(uint32_t announced) {
    bytes += announced;
    arrive();
  }
  void brought(uint32_t more) {
    bytes -= more;
    settle();
  }
  /// Who is told no may ask again until another thread block has done something: let it.
  bool is_over(uint32_t parity) const {
    if (phase == parity) emulated::block->poll();
    return phase != parity;
  }
  void wait(uint32_t parity) const {
    emulated::block->wait([](const void* on, uint64_t what) { return static_cast<const Barrier*>(on)->phase != what; },
                          this, parity, "a barrier");
  }

 private:
  void settle() {
    if (missing || bytes) return;
    missing = arrivals;
    phase ^= 1;
  }
};
static_assert(sizeof(Barrier) == 8);

inline void fence_async_proxy() {}
inline void publish_barriers() {}
inline void prefetch_map(const CUtensorMap*) {}

/// A box comes as one piece, to where `to` is in the shared memory of `block`: what lies inside the array, and zeros.
template <size_t kAxes>
void bring_box(const emulated::Block& block, uint32_t to, const CUtensorMap& map,
               const std::array<int32_t, kAxes>& at) {
  if (map.axes != static_cast<int>(kAxes)) return emulated::complain("a box has other axes than its map");
  if (to % 128) return emulated::complain("a box begins off 128 bytes");
  const int row_bytes = map.box[0] * map.element_bytes;
  for (int row = 0; row < map.box[1] * map.box[2]; ++row, to += row_bytes) {
    const uint8_t* from = map.data;
    bool inside = true;
    for (size_t axis = 1; axis < kAxes; ++axis) {
      const int64_t index = int64_t{at[axis]} + (axis == 1 ? row % map.box[1] : axis == 2 ? row / map.box[1] : 0);
      inside &= index >= 0 && index < map.extents[axis];
      from += index * map.strides[axis];
    }
    for (int vector = 0; vector < row_bytes; vector += 16) {
      const int64_t first = at[0] + vector / map.element_bytes;  // boxes begin inside, at whole vectors
      const int64_t here = inside ? std::clamp<int64_t>((map.extents[0] - first) * map.element_bytes, 0, 16) : 0;
      const uint32_t plain = to + vector;
      uint8_t* const place = block.shared + (plain ^ (plain >> 3 & (map.swizzle - 1) & 0x70));
      std::memset(place, 0, 16);
      if (here > 0) std::memcpy(place, from + first * map.element_bytes, here);
    }
  }
}

template <int kAxes>
void load_box_for(emulated::Block& block, void* shared, const CUtensorMap* map, const int32_t (&at)[kAxes],
                  Barrier& barrier) {
  const uint32_t to = shared_address(shared);
  Barrier* const full = counterpart(block, &barrier);
  // The map is copied: arguments lie on the stack of their thread, which may end before.
  block.bring([&block, to, map = *map, full, at = std::to_array(at)] {
    bring_box(block, to, map, at);
    full->brought(map.box[0] * map.box[1] * map.box[2] * map.element_bytes);
  });
}

template <int kAxes>
void load_box(void* shared, const CUtensorMap* map, const int32_t (&at)[kAxes], Barrier& barrier) {
  load_box_for(*emulated::block, shared, map, at, barrier);
}
inline void load_box_for_both(void* shared, const CUtensorMap* map, const int32_t (&at)[4], Barrier& barrier) {
  for (emulated::Block* block : emulated::block->cluster.blocks) load_box_for(*block, shared, map, at, barrier);
}

}  // namespace fa3::arch
