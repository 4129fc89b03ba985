// How e4m3 values become an operand of the second product: the map from a block of V to its transpose.
//
// Tensor cores take 8-bit operands only with the contraction along their rows, so V [key][dim] has to be turned, and
// they take P's 32 keys of a step in another order than the first product left them. Neither costs P an instruction if
// the transpose puts the keys where P has them.
//
// A thread of quad lane t holds columns 8 i + 2 t + e of the scores (e = 0, 1), and packs columns of i = 2 j and 2 j +
// 1 into a word: the bytes are keys 16 j + {2 t, 2 t + 1, 8 + 2 t, 8 + 2 t + 1}. As an A operand that word has places
// 16 j + 4 t + {0, 1, 2, 3} of the contraction. So place 4 t + 2 h + e of each 16 is key 8 h + 2 t + e: key_at().
//
// The transpose comes to just that. ldmatrix.trans of 8 keys x 16 bytes gives lane 4 g + t the dims 2 g and 2 g + 1 of
// keys 2 t and 2 t + 1: bytes (key 2 t, dim 2 g), (2 t, 2 g + 1), (2 t + 1, 2 g), (2 t + 1, 2 g + 1). Bytes 0 and 2 of
// that and of the next 8 keys are the word of dim 2 g, places 4 t to 4 t + 3; bytes 1 and 3 are that of dim 2 g + 1.
// stmatrix puts the words of a quad side by side: 16 places of one dim.
#pragma once
#include <cstdint>

#include "arch/host_device.h"

namespace fa3 {

/// The key, of each 16, at a place of the contraction.
FA3_HOST_DEVICE constexpr int key_at(int place) { return 8 * (place / 2 % 2) + 2 * (place / 4) + place % 2; }

/// V turned: for each step of 32 keys [dim][32 places], a byte each, swizzled 32 bytes wide.
template <int kKeys, int kDims>
struct TurnedTile {
  static constexpr int kStepKeys = 32, kGroupDims = 16;  // what ldmatrix and stmatrix move at once
  static constexpr int kSteps = kKeys / kStepKeys, kGroups = kDims / kGroupDims;
  static constexpr int kStepBytes = kDims * kStepKeys, kGroupBytes = kGroupDims * kStepKeys;
  static constexpr int kBytes = kSteps * kStepBytes;
  static_assert(kKeys % kStepKeys == 0, "a product of e4m3 consumes 32 keys at a time");
  static_assert(kStepBytes % 256 == 0, "a swizzle 32 bytes wide repeats every 256");
  static_assert(kDims % kGroupDims == 0, "dims are turned 16 at a time");

  static constexpr int kSwizzle = 32, kStrideOffset = 8 * kSwizzle;  // from 8 dims to the next 8
  /// Where the products' step-th 32 keys begin, in a descriptor's units of 16 bytes.
  FA3_HOST_DEVICE static constexpr int row_step(int step) { return step * kStepBytes >> 4; }
  /// How much further a product's first dim is than dim 0: a multiple of 8.
  FA3_HOST_DEVICE static constexpr int column(int dim) { return dim * kStepKeys >> 4; }
};

/// What one lane does, 32 keys x 16 dims at a time.
struct TurningLane {
  uint32_t source;  // offset of the 16 bytes that it gives ldmatrix the address of: those of key `lane`
  uint32_t target;  // offset of the 16 bytes that it gives stmatrix the address of
  uint32_t evens;   // the __byte_perm selector for matrices 0 and 2 of stmatrix

  /// `chunk_bytes`: the width of a chunk of V as TMA brought it, the swizzle's too.
  FA3_HOST_DEVICE constexpr TurningLane(int lane, int chunk_bytes)
      : source(lane * chunk_bytes + (lane * chunk_bytes >> 3 & (chunk_bytes - 16))), target(0), evens(0x6420) {
    // Even dims alone would lie 64 bytes apart and meet half of the banks, so 8 rows of stmatrix are the even dims of
    // the first 8 and the odd ones of the other 8, or the reverse.
    if (lane / 4 >= 4) evens = 0x7531;
    const int matrix = lane / 8, row = lane % 8;
    const int odd = matrix % 2 ^ (row >= 4), dim = 2 * row + odd, half = matrix / 2;
    target = 32 * dim + 16 * (half ^ (dim >> 2 & 1));
  }

  /// The selector for matrices 1 and 3.
  FA3_HOST_DEVICE constexpr uint32_t odds() const { return evens ^ 0x1111; }
};

}  // namespace fa3
