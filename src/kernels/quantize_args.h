// What the quantisation kernel is told, and the counting of rows and places that host and device share.
#pragma once
#include <cstdint>

#include "attention/divisor.h"

namespace fa3 {

/// Rows that share a scale, as up to three strided axes, outermost first. One axis is what most calls have: it needs no
/// quotient.
struct RowAxes {
  int count;        // 1 to 3
  Divisor size[3];  // size[0] is not needed
  int64_t x[3];     // elements
  int64_t out[3];   // bytes

  struct Offsets {
    int64_t x, out;
  };
  FA3_HOST_DEVICE Offsets of(uint32_t row) const {
    if (count == 1) return {row * x[0], row * out[0]};
    Offsets offsets{0, 0};
    uint32_t rest = row;
    for (int axis = 2; axis > 0; --axis) {
      if (axis >= count) continue;
      const uint32_t outer = size[axis].quotient(static_cast<int>(rest));
      const uint32_t index = rest - outer * size[axis].divisor;
      offsets.x += index * x[axis];
      offsets.out += index * out[axis];
      rest = outer;
    }
    offsets.x += rest * x[0];
    offsets.out += rest * out[0];
    return offsets;
  }
};

/// With a rotation, inputs are clipped to kHuge, so that no sum of up to 1,024 of them is infinite, and what is larger
/// than kRotatedLimit after it counts as infinite: a clipped input leaves every element of its block above that.
inline constexpr float kHuge = 0x1p116f, kRotatedLimit = 0x1p111f;
/// So that a descale has an inverse, and norms over it are finite.
inline constexpr float kMinDescale = 0x1p-90f;
inline constexpr float kMaxE4m3 = 448;

/// Places that a thread block has at most; a unit's amax is kept from scan to write, and they bound how many are.
inline constexpr int kMaxPlaces = 7;
inline constexpr int kMaxPlacesBytes = 224 << 10;  // of all of them

/// Where a thread keeps what its steps have loaded, from the pass that looks for amax to the pass that rounds. The
/// first `kept` steps have a place each; the others share a ring of the last places, and those that the ring has lost
/// by the end of the first pass are loaded again. The second pass goes backwards, so that these are the freshest in L2.
struct Places {
  int steps, kept, ring;

  FA3_HOST_DEVICE Places(int places, int steps, int ring)
      : steps(steps), kept(steps <= places ? steps : places - ring), ring(ring) {}
  FA3_HOST_DEVICE int of(int step) const { return step < kept ? step : kept + (step - kept) % ring; }
  FA3_HOST_DEVICE bool lost(int step) const { return step >= kept && step < steps - ring; }
};

/// 8-byte words that a part has in the workspace.
inline constexpr int kPartWords = 2;

struct QuantizeArgs {
  const void* x;
  uint8_t* out;
  float* descale;
  const int32_t* cu_seqlens;  // (batch + 1), or null

  int units;                                          // scales
  int unit_heads;                                     // unit u is head u % unit_heads of batch entry u / unit_heads
  int64_t x_unit[2], out_unit[2], descale_stride[2];  // from one (batch entry, head) to the next
  uint32_t unit_rows;                                 // with cu_seqlens, of all sequences
  RowAxes rows;
  int head_dim;
  float limit;  // what is larger counts as infinite

  int groups, blocks_per_group;  // thread blocks of a group share each of its units; group g has units g, g + groups …
  int row_lanes;                 // lanes that have a row; of a rotation in two columns, a power of two
  int step_rows;                 // of a thread block
  int slot_rows, warp_rows;      // of them in a slot, and of these in each warp
  int unit_steps;                // of each unit, where they go through as one stream; else 0
  int places;
  bool x_vectors, out_vectors;  // addresses and strides are multiples of 16 and 8 bytes
  bool plain;                   // vectors, rows along one axis: a whole step needs no tests

  uint64_t ticket;       // whose the words of the workspace are
  uint64_t* parts;       // (units, blocks_per_group, kPartWords): each block's amax, once it is there
  uint64_t* departures;  // (groups): counters of the blocks that need no part any more
};

}  // namespace fa3
