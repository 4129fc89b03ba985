// How a block of keys or values comes into shared memory: in one piece, or page by page.
#pragma once
#include "arch/gather.cuh"
#include "kernels/forward_args.h"
#include "kernels/forward_pair.cuh"
#include "kernels/forward_traits.cuh"

namespace fa3 {

/// Rows one after another: one lane asks for a whole block. All of the loader's warp come along, with numbers that are
/// known to be the same: in one lane's own branch each TMA load would stand in a loop over lanes.
template <class Traits>
struct ContiguousKeys {
  /// Where a sequence's keys or values of one head are.
  struct Source {
    const CUtensorMap* map;
    int first_row, head, batch;
    Pair<Traits> pair;
  };

  __device__ __forceinline__ static Source source(const typename Traits::Args& args, const TmaOperand& operand,
                                                  const TileHead& work) {
    return {&operand.map, arch::uniform(work.k_begin), arch::uniform(work.head_kv) * operand.head_step,
            arch::uniform(work.batch_kv) * operand.batch_step, Pair<Traits>::of(args)};
  }

  /// Where a block is, of keys and of values alike.
  using Place = int;  // its first row
  __device__ __forceinline__ static Place place(const Source& from, int n_block) {
    return from.first_row + n_block * Traits::kTileN;
  }

  template <class Tile>
  __device__ __forceinline__ static void load(const Source& from, int, int n_block, Place row, uint8_t* to,
                                              arch::Barrier& full) {
    if (!arch::elected()) return;
    full.arrive_expecting(Tile::kBytes);
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      uint8_t* const place = to + chunk * Tile::kChunkBytes;
      const int32_t at[] = {chunk * Tile::kChunkColumns, row, from.head, from.batch};
      if (!from.pair.exists)
        arch::load_box(place, from.map, at, full);
      else if (from.pair.brings(n_block * Tile::kChunks + chunk))
        arch::load_box_for_both(place, from.map, at, full);
    }
  }
};

/// Rows in pages: every lane of the loader's warp looks up pages and asks for what lies in them. Rows past the
/// sequence's end, and those of pages that do not exist, are zeros, and nothing is read for them.
template <class Traits>
struct PagedKeys {
  /// A sequence's keys or values of one head. Its numbers stay in shared memory: registers are few here.
  struct Source {
    const KeyPages& pages;
    const TmaOperand& operand;
    const TileHead& work;

    /// The page of a row, counted from the sequence's first, as the page table has it; and where the row lies then.
    __device__ __forceinline__ int page(int row) const {
      return row < work.seqlen_k ? pages.rows.entry(work.batch_kv, work.k_begin + row) : CacheRow::kNone;
    }
    __device__ __forceinline__ CacheRow in_page(int page, int row) const {
      return pages.rows.in_entry(page, work.k_begin + row);
    }
    __device__ __forceinline__ int head() const { return work.head_kv * operand.head_step; }
  };

  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ static Source source(const typename Traits::Args& args, const TmaOperand& operand,
                                                  const TileHead& work) {
    return {args.extras.pages, operand, work};
  }

  using Place = int;  // the page of this lane's box, if there is such a page

  __device__ __forceinline__ static Place place(const Source& from, int n_block) {
    return from.page(n_block * Traits::kTileN + lane() * from.pages.box_rows);
  }

  /// A block, of whose rows `columns` exist in the array.
  template <class Tile>
  __device__ __forceinline__ static void load(const Source& from, int columns, int n_block, Place page, uint8_t* to,
                                              arch::Barrier& full) {
    if (from.pages.box_rows > 0)
      load_boxes<Tile>(from, page, n_block * Traits::kTileN, to, full);
    else
      gather<Tile>(from, columns, n_block * Traits::kTileN, to, full);
  }

 private:
  /// A lane for each box, and where there are more than lanes another: each of those is looked up when it is its turn.
  /// A box may begin anywhere inside the swizzle's pattern, which goes by addresses.
  template <class Tile>
  __device__ __forceinline__ static void load_boxes(const Source& from, Place page, int first_row, uint8_t* to,
                                                    arch::Barrier& full) {
    if (arch::leads()) full.arrive_expecting(Tile::kBytes);
    __syncwarp();  // announced before the first byte can be there
    const int rows = from.pages.box_rows;
#pragma unroll 1
    for (int first = lane() * rows; first < Traits::kTileN; first += 32 * rows) {
      if (first >= 32 * rows) page = from.page(first_row + first);
      const CacheRow found = from.in_page(page, first_row + first);
      // A box behind a page's last row brings zeros.
      const int row = found.exists() ? found.row : from.pages.rows.page_size.divisor;
      const int entry = found.exists() ? found.entry * from.operand.batch_step : 0;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
        arch::load_box(to + chunk * Tile::kChunkBytes + first * Tile::kRowBytes, &from.operand.map,
                       {chunk * Tile::kChunkColumns, row, from.head(), entry}, full);
    }
  }

  /// 16 bytes a lane at a time. The lanes of a row's chunk bring the row's other chunks as well: looking up takes
  /// longer than asking.
  template <class Tile>
  __device__ __forceinline__ static void gather(const Source& from, int columns, int first_row, uint8_t* to,
                                                arch::Barrier& full) {
    constexpr int kLanes = Tile::kRowBytes / 16;  // of a row
    const int first_column = lane() % kLanes * (16 / Traits::kElementBytes);
#pragma unroll 1
    for (int row = lane() / kLanes; row < Traits::kTileN; row += 32 / kLanes) {
      const CacheRow found = from.in_page(from.page(first_row + row), first_row + row);
      uint32_t place = arch::shared_address(to) + Tile::offset(row, first_column);
      const uint8_t* data = from.operand.data + first_column * Traits::kElementBytes;
      if (found.exists())
        data += int64_t{found.entry} * from.operand.batch_step * from.operand.batch_bytes +
                found.row * from.operand.row_bytes + from.head() * from.operand.head_bytes;
      const int end = found.exists() ? columns : 0;  // past which nothing is read
#pragma unroll 1
      for (int column = first_column; column < Tile::kChunks * Tile::kChunkColumns; column += Tile::kChunkColumns) {
        arch::copy_vector(place, data, column < end);
        place += Tile::kChunkBytes;
        data += Tile::kRowBytes;
      }
    }
    arch::wait_for_vectors();
    arch::fence_async_proxy();
    __syncwarp();
    if (arch::leads()) full.arrive();
  }
};

}  // namespace fa3
