// Of src/arch/barrier.cuh what the emulated kernels need. What the copy engine brings is there at once.
#pragma once
#include <cuda.h>

#include "arch/wgmma.cuh"
#include "emulated.h"

namespace fa3::arch {

struct Barrier {
  int arrivals, missing, bytes;
  uint32_t phase;

  void init(int threads) { arrivals = missing = threads, bytes = 0, phase = 0; }
  void arrive() { --missing, settle(); }
  void arrive_expecting(int announced) { bytes += announced, arrive(); }
  void brought(int more) { bytes -= more, settle(); }
  bool is_over(uint32_t parity) const { return phase % 2 != parity; }
  void wait(uint32_t parity) const {
    while (!is_over(parity)) emulated::block->yield();
  }

 private:
  void settle() {
    if (missing || bytes) return;
    missing = arrivals;
    ++phase;
  }
};

inline void fence_async_proxy() {}
inline void publish_barriers() {}

inline void load_box(void* shared, const CUtensorMap* map, const int32_t (&at)[4], Barrier& barrier) {
  for (int row = 0; row < map->rows; ++row)
    for (int column = 0; column < map->columns; ++column) {
      const int64_t index[] = {at[0] + column, at[1] + row, at[2], at[3]};
      int64_t offset = 0;
      bool inside = true;
      for (int axis = 0; axis < 4; ++axis) {
        inside &= index[axis] >= 0 && index[axis] < map->extents[axis];
        offset += index[axis] * map->strides[axis];
      }
      const uint32_t plain = shared_address(shared) + row * map->swizzle + 2 * column;
      uint8_t* to = emulated::dynamic_shared() + (plain ^ (plain >> 3 & (map->swizzle - 1) & 0x70));
      const uint16_t nothing = 0;
      std::memcpy(to, inside ? static_cast<const void*>(map->data + offset) : &nothing, 2);
    }
  barrier.brought(map->rows * map->columns * 2);
}

}  // namespace fa3::arch
