// How a tile lies in shared memory for TMA and wgmma.
#pragma once
#include "arch/host_device.h"
#include "arch/wgmma.cuh"

namespace fa3 {

/// kRows rows of kColumns elements, cut into chunks of kSwizzle bytes of each row: [chunk][row][kSwizzle bytes],
/// swizzled within 8 rows. TMA brings a chunk as one box; a row that does not fill its last chunk is padded with zeros.
template <int kRows, int kColumns, int kSwizzle, int kElementBytes = 2>
struct SharedTile {
  static constexpr int kChunkColumns = kSwizzle / kElementBytes;
  static constexpr int kChunks = ceil_div(kColumns * kElementBytes, kSwizzle);
  static constexpr int kRowBytes = kSwizzle;  // from a row of a chunk to the next
  static constexpr int kChunkBytes = kRows * kRowBytes;
  static constexpr int kBytes = kChunks * kChunkBytes;
  static_assert(kRows % 8 == 0, "the swizzle repeats every 8 rows");
  static_assert(kColumns % 16 == 0, "a product consumes 16 columns or rows at a time");

  /// Products along the columns take 32 bytes at a time, zeros of the last chunk among them.
  static constexpr int kColumnSteps = ceil_div(kColumns * kElementBytes, 32);
  static_assert(kColumnSteps * 32 <= kChunks * kSwizzle, "the last step must find zeros behind a row");

  /// As an operand whose contraction runs along the columns (Q, K): 8 rows further is 8 kSwizzle bytes further.
  static constexpr uint64_t kMajorColumns = arch::descriptor_layout(kSwizzle, 16, 8 * kSwizzle);
  /// As an operand whose contraction runs along the rows (V): the next chunk of columns is a chunk further.
  static constexpr uint64_t kMajorRows = arch::descriptor_layout(kSwizzle, kChunkBytes, 8 * kSwizzle);

  /// Where an element lies, in bytes: the swizzle exchanges vectors of 16 bytes by bits 7 to 9 of where they would be.
  FA3_HOST_DEVICE static constexpr int offset(int row, int column) {
    const int byte = column * kElementBytes, place = row * kSwizzle + byte % kSwizzle;
    return byte / kSwizzle * kChunkBytes + (place ^ (place >> 3 & (kSwizzle - 1) & 0x70));
  }

  /// Where the products' step-th 32 bytes of columns (or 16 rows) begin, in a descriptor's units of 16 bytes.
  FA3_HOST_DEVICE static constexpr int column_step(int step) {
    return (step * 32 / kSwizzle * kChunkBytes + step * 32 % kSwizzle) >> 4;
  }
  FA3_HOST_DEVICE static constexpr int row_step(int step) { return step * 16 * kSwizzle >> 4; }
};

/// A warpgroup makes zeros of the rows from `first` on of a tile, or of the tiles of several stages.
template <class Tile, int kTiles>
__device__ __forceinline__ void clear_rows(uint8_t* tile, int first) {
  constexpr int kVectors = Tile::kRowBytes / 16, kRows = Tile::kChunkBytes / Tile::kRowBytes;
  for (int chunk = 0; chunk < kTiles * Tile::kChunks; ++chunk) {
    auto* vectors = reinterpret_cast<uint4*>(tile + chunk * Tile::kChunkBytes);
    for (int i = first * kVectors + threadIdx.x % 128; i < kRows * kVectors; i += 128)
      vectors[i] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace fa3
