// What a forward kernel is launched with.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "attention/block_range.h"
#include "attention/cache.h"
#include "attention/divisor.h"
#include "attention/dropout.h"
#include "attention/packing.h"
#include "attention/splits.h"
#include "attention/tile_scheduler.h"

namespace fa3 {

/// An operand that TMA loads: axes (dim, row, head, batch), and for q (dim, head of its KV head, row, KV head, batch).
/// What lies past an axis' end arrives as zeros.
struct TmaOperand {
  CUtensorMap map;
  int head_step, batch_step;  // 1, or 0 where the axis does not move
  // The same array without a map, for rows that TMA cannot bring.
  const uint8_t* data;
  int64_t row_bytes, head_bytes, batch_bytes;
};

/// Where the keys of a paged cache are: its pages are what is the batch of k and v else.
struct KeyPages {
  CacheRows rows;
  int box_rows;  // that TMA brings at once: they divide a page and a block of keys; 0: rows are gathered

  FA3_HOST_DEVICE bool used() const { return rows.page_table != nullptr; }
};

/// Factors of an fp8 operand. A null pointer: 1.
struct Descale {
  const float* data;
  int64_t batch_stride, head_stride;
  int group;  // heads in a row that share a factor

#ifdef __CUDACC__
  __device__ __forceinline__ float at(int batch, int head) const {
    return data ? __ldg(data + batch * batch_stride + head / group * head_stride) : 1.f;
  }
#endif
};

struct ForwardArgs {
  TmaOperand q, k, v;
  TmaOperand qv;            // as q, for kernels whose scores add qv v
  const uint8_t* turned_v;  // (batch, KV head, block of keys), as a kernel of turned values has a block's
  bool absorbed;            // qv v has the factors of q and k, since v is part of k

  void* out;
  int64_t out_stride[3];  // elements: batch, row, head
  bool out_vectors;       // 16-byte stores fit every address and stride
  bool out_float16;       // of fp8 operands: out is float16, not bfloat16
  float* lse;             // or null
  int64_t lse_stride[3];  // elements: batch, head, row

  Lengths queries;
  KeyRows keys;
  KeyPages pages;
  Visibility visibility;
  int batch, num_heads_kv, head_dim, head_dim_v;
  Packing packing;  // of the query heads of each KV head
  Divisor heads;    // tiles side by side of a sequence: num_heads_kv * packing.tiles
  Divisor queries_of_tile;

  Descale q_descale, k_descale, v_descale;  // of fp8 operands
  // Of fp8: blocks whose P V tensor cores add up before they move on to fp32. 0: all; 1: each is added to O, for
  // kernels without shared totals or qv; from 2 on there are totals.
  int accumulate_blocks;
  float4* totals;  // (grid, consumer warpgroup, 4 columns of 8, thread): of kernels without shared ones

  float score_scale_log2;  // exponent = score * score_scale_log2 - max
  float hidden;            // what a masked score becomes: minus infinity once scaled
  float softcap_scale;     // softmax_scale / softcap, or 0: no softcap
  const float* sinks;      // (num_heads), or null
  bool plain_blocks;       // no softcap: a block without a mask takes the short way
  Dropout dropout;
  bool exact_max;  // take each row's true maximum in every block (batch_invariant)

  bool paired;     // thread blocks go in pairs, for which queries_of_tile, order and splits are: see forward_pair.cuh
  int most_tiles;  // of a ragged batch: sequences that overlap would make more, and the workspace has no room for them
  TileOrder order;
  bool plain_pieces;  // every sequence is one tile of each head, and its queries see all keys, from the first row on
  Splits splits;
  uint64_t ticket;          // this call's, for its counters
  uint64_t* piece_counter;  // of the pieces of work handed out, or null: they are dealt out in turn
  float* parts;             // results of split tiles' parts: see forward_split.cuh, or leave_rows()
  uint64_t* parts_done;     // a counter for each warpgroup of a split tile
  float* parts_lse;         // of leave_rows(): (part, row, head)
  int64_t part_rows;        // of all heads, in each of them
};

}  // namespace fa3
