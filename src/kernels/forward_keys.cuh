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
  __device__ __forceinline__ explicit ContiguousKeys(int) {}

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
  __device__ __forceinline__ static Place settled(const Source&, Place place) { return place; }
  /// A piece of work ends: all of it is to come without another.
  __device__ __forceinline__ static void finish() {}

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

/// Rows in pages. Those past the sequence's end, and those of pages that do not exist, are zeros, and nothing is read
/// for them.
template <class Traits>
struct PagedKeys {
  /// A sequence's keys or values of one head.
  struct Source {
    const KeyPages& pages;
    const TmaOperand& operand;
    const int* page_table;  // the sequence's part
    int first_row;          // counted from its first page's. The scheduler has seen to it that the table has all rows
    int rows;
    int head;
  };

  __device__ __forceinline__ static Source source(const typename Traits::Args& args, const TmaOperand& operand,
                                                  const TileHead& work) {
    const KeyPages& pages = args.extras.pages;
    const int* page_table = pages.rows.page_table + work.batch_kv * pages.rows.page_table_stride;
    asm volatile("" : "+l"(page_table));  // computed once, not for each block
    return {pages,
            operand,
            page_table,
            arch::uniform(work.k_begin),
            arch::uniform(work.seqlen_k),
            arch::uniform(work.head_kv) * operand.head_step};
  }

  /// A page, as the page table has it or kNone, and a row of it.
  struct Place {
    int page, row;
  };

 protected:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ static Place place_of_row(const Source& from, int row) {
    if (row >= from.rows) return {CacheRow::kNone, 0};
    row += from.first_row;
    const Divisor& page_size = from.pages.rows.page_size;
    const int page = page_size.quotient(row);
    return {__ldg(from.page_table + page), row - page * page_size.divisor};
  }

  __device__ __forceinline__ static bool exists(const Source& from, const Place& place) {
    return static_cast<uint32_t>(place.page) < static_cast<uint32_t>(from.pages.rows.entries);
  }
};

/// By TMA: every lane of the loader's warp looks up the page of a box of rows, and one of them asks for all boxes.
template <class Traits>
struct BoxedKeys : PagedKeys<Traits> {
  __device__ __forceinline__ explicit BoxedKeys(int) {}
  using typename PagedKeys<Traits>::Source;
  using typename PagedKeys<Traits>::Place;
  using PagedKeys<Traits>::lane, PagedKeys<Traits>::place_of_row, PagedKeys<Traits>::exists;

  /// Where this lane's box of a block lies.
  __device__ __forceinline__ static Place place(const Source& from, int n_block) {
    const int first = lane() * from.pages.box_rows;
    if (n_block < 0 || first >= Traits::kTileN) return {CacheRow::kNone, 0};
    return place_of_row(from, n_block * Traits::kTileN + first);
  }

  /// The same once memory has answered. A page behind the last brings zeros.
  __device__ __forceinline__ static Place settled(const Source& from, const Place& place) {
    return {exists(from, place) ? place.page : from.pages.rows.entries, place.row};
  }
  __device__ __forceinline__ static void finish() {}

  /// A lane has looked up each box, and where there are more than lanes another: those when it is their turn. A box may
  /// begin anywhere inside the swizzle's pattern, which goes by addresses.
  template <class Tile>
  __device__ __forceinline__ static void load(const Source& from, int, int n_block, Place place, uint8_t* to,
                                              arch::Barrier& full) {
    const int rows = from.pages.box_rows, page_size = from.pages.rows.page_size.divisor;
    int row = arch::uniform(place.row);
    // Pages may all be the same: then the map has but one.
    if (!from.operand.batch_step) place.page = place.page == from.pages.rows.entries;
    if (arch::elected()) full.arrive_expecting(Tile::kBytes);
#pragma unroll 1
    for (int first = 0, box = 0; first < Traits::kTileN; first += rows, ++box) {
      if (box == 32) {
        place = settled(from, place_of_row(from, n_block * Traits::kTileN + first + lane() * rows));
        box = 0;
      }
      const int32_t entry = __shfl_sync(~0u, place.page, box);
      if (arch::elected()) {
#pragma unroll
        for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
          arch::load_box(to + chunk * Tile::kChunkBytes + first * Tile::kRowBytes, &from.operand.map,
                         {chunk * Tile::kChunkColumns, row, from.head, entry}, full);
      }
      row = row + rows == page_size ? 0 : row + rows;
    }
  }
};

/// Where boxes would be small: 16 bytes a lane at a time, a row by as many lanes as a chunk of it has vectors, which
/// bring its other chunks as well. Each lane looks up a row. All warps that load take turns with rows.
template <class Traits>
class GatheredKeys : public PagedKeys<Traits> {
  using PagedKeys<Traits>::lane, PagedKeys<Traits>::place_of_row, PagedKeys<Traits>::exists;

  // Blocks on their way when an older one is waited for. What consumers need before they give a block back that the
  // loader waits for must not be among these: with turns, which one warpgroup waits for while another skips blocks, it
  // is the last, and so it is with qv, where there may be one stage. (tests/pipeline_model.py)
  static constexpr int kLater = Traits::kHasQv || Traits::kTakesTurns ? 0 : 2;
  static constexpr int kLoaders = Traits::kGatherers;

 public:
  using typename PagedKeys<Traits>::Source;

  __device__ __forceinline__ explicit GatheredKeys(int loader) : loader_(loader) {}

  struct Place {};
  __device__ __forceinline__ static Place place(const Source&, int) { return {}; }
  __device__ __forceinline__ static Place settled(const Source&, Place) { return {}; }

  /// A block, of whose rows `columns` exist in the array.
  template <class Tile>
  __device__ __forceinline__ void load(const Source& from, int columns, int n_block, Place, uint8_t* to,
                                       arch::Barrier& full) {
    constexpr int kLanes = Tile::kRowBytes / 16, kRows = 32 / kLanes;  // of a row; at once
    constexpr int kUnits = Traits::kTileN / kRows;
    constexpr int kUnrolled = Traits::kProducerRegisters < 40 || Traits::kHasQv ? 1 : 4;  // or registers spill
    static_assert(Traits::kTileN % kRows == 0, "a block is rows that are brought at once");
    const TmaOperand& operand = from.operand;
    const int column = lane() % kLanes * (16 / Traits::kElementBytes);
#pragma unroll 1
    for (int first = loader_; first < kUnits; first += kLanes * kLoaders) {
      const int own_row = (first + lane() / kRows * kLoaders) * kRows + lane() % kRows;
      int64_t own_offset = kNowhere;
      if (own_row < Traits::kTileN) {
        const auto own = place_of_row(from, n_block * Traits::kTileN + own_row);
        if (exists(from, own))
          own_offset = int64_t{own.page} * operand.batch_step * operand.batch_bytes + own.row * operand.row_bytes +
                       from.head * operand.head_bytes;
      }
#pragma unroll kUnrolled
      for (int turn = 0; turn < kLanes && first + turn * kLoaders < kUnits; ++turn) {
        const int64_t offset = __shfl_sync(~0u, own_offset, turn * kRows + lane() / kLanes);
        const uint8_t* const data = operand.data + offset + column * Traits::kElementBytes;
        const int end = offset == kNowhere ? 0 : columns;  // past which nothing is read
        const int row = (first + turn * kLoaders) * kRows + lane() / kLanes;
        const uint32_t place = arch::shared_address(to) + Tile::offset(row, column);
#pragma unroll
        for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
          arch::copy_vector(place + chunk * Tile::kChunkBytes, data + chunk * Tile::kRowBytes,
                            end > column + chunk * Tile::kChunkColumns);
      }
    }
    arch::close_vectors();
    if constexpr (kLater > 0) {
      if (under_way_[0]) {
        arch::wait_for_vectors<kLater>();
        announce(under_way_[0]);
      }
      for (int i = 0; i + 1 < kLater; ++i) under_way_[i] = under_way_[i + 1];
      under_way_[kLater - 1] = arch::shared_address(&full);
    } else {
      arch::wait_for_vectors<0>();
      announce(arch::shared_address(&full));
    }
  }

  __device__ __forceinline__ void finish() {
    arch::wait_for_vectors<0>();
    for (uint32_t& full : under_way_) {
      if (full) announce(full);
      full = 0;
    }
  }

 private:
  static constexpr int64_t kNowhere = -1;

  /// This lane's part of a block is there, for tensor cores too.
  __device__ __forceinline__ static void announce(uint32_t full) {
    arch::fence_async_proxy();
    static_cast<arch::Barrier*>(__cvta_shared_to_generic(full))->arrive();
  }

  const int loader_;
  uint32_t under_way_[larger(kLater, 1)] = {};  // their barriers in shared memory, the oldest first, or 0
};

}  // namespace fa3
