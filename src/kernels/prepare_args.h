// What the kernel before attention is launched with: new keys for the cache, and rotated queries.
#pragma once
#include <cstdint>

#include "attention/cache.h"

namespace fa3 {

inline constexpr int kPrepareThreads = 256;
/// Elements of a unit, the work of a thread: two vectors of 8, whose elements make 8 pairs where they are turned.
inline constexpr int kPrepareUnit = 16;

/// An array of 16 or 8 bits: element (b, r, h, d) at b stride[0] + r stride[1] + h stride[2] + d.
struct StridedRows {
  void* data;
  int64_t stride[3];
  bool vectors;  // accesses of 8 elements fit its address and strides

  FA3_HOST_DEVICE int64_t offset(int64_t entry, int64_t row, int head) const {
    return entry * stride[0] + row * stride[1] + head * stride[2];
  }
};

/// Rotary embedding of the first `dim` elements of a row, as cos and sin (rows, dim / 2) say.
struct RotaryArgs {
  const void *cos, *sin;
  const int* seqlens;  // (batch) first positions, or null: the cached lengths
  int rows, dim;       // dim 0: nothing turns
  bool fp32;           // cos and sin; else they are as q
  bool vectors;        // cos and sin begin at multiples of 16 bytes
  bool interleaved;    // pairs are elements 2i and 2i + 1; else i and i + dim / 2
  bool each_query;     // query i stands at first + i; else all stand at the first position
};

struct PrepareArgs {
  StridedRows k_new, v_new, k, v;  // null k_new: nothing is appended
  StridedRows q;
  uint16_t* rotated_q;  // contiguous (batch, row, head, dim), 16-byte aligned; null: q does not turn
  int* seqlens_k;       // (batch): written, rows in use once the new ones are there; null: nothing is appended
  Lengths queries, new_keys;
  CachedLengths cached;
  CacheRows cache;
  RotaryArgs rotary;
  int batch, num_heads, num_heads_kv, head_dim, head_dim_v;

  // Thread blocks: first those of new rows, then those of queries.
  int64_t new_rows, query_rows;                  // rows of the arrays
  int new_rows_per_block, query_rows_per_block;  // what a thread block takes
  int64_t new_blocks, blocks;

  FA3_HOST_DEVICE static int units(int head_dim) { return ceil_div(head_dim, kPrepareUnit); }
  FA3_HOST_DEVICE int units_of_new_row() const { return num_heads_kv * (units(head_dim) + units(head_dim_v)); }
  FA3_HOST_DEVICE int units_of_query() const { return num_heads * units(head_dim); }
};

}  // namespace fa3
