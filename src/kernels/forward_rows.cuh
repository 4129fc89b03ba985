// What a row of a tile is: a query of a sequence, a head, and their place in memory.
#pragma once
#include "kernels/forward_args.h"
#include "kernels/forward_traits.cuh"

namespace fa3 {

/// The query, counted from its sequence's first, that a warpgroup's row belongs to.
template <class Traits>
__device__ __forceinline__ int query_of(const typename Traits::Args& args, const TileHead& work, int warpgroup,
                                        int row) {
  return work.first_query + Traits::row_group(warpgroup) * args.packing().positions + args.packing().position_of(row);
}

/// The factor of what queries are multiplied with for their fp8 scores: keys, but with qv values, to whose scale the
/// keys' part is brought. So it must not be 0 there; this small, it makes their part nothing all the same.
template <class Traits>
__device__ __forceinline__ float key_descale(const typename Traits::Args& args, const TileHead& work) {
  if (!Traits::kHasQv || args.absorbed) return args.k_descale.at(work.batch, work.head_kv);
  const float descale = args.v_descale.at(work.batch, work.head_kv);
  return descale == 0 ? 1e-20f : descale;
}

/// The factor of fp8 scores of a tile's head, counted from the first query head of its KV head.
template <class Traits>
__device__ __forceinline__ float score_descale(const typename Traits::Args& args, const TileHead& work, int head) {
  return args.q_descale.at(work.batch, work.head_kv * args.packing().ratio + head) * key_descale<Traits>(args, work);
}

/// A piece's descales, by one thread. What is read is all asked for before any of it is waited for.
template <class Traits>
__device__ __forceinline__ void find_descales(const typename Traits::Args& args, TileHead& work) {
  const float score = score_descale<Traits>(args, work, work.first_head);
  const float value = args.v_descale.at(work.batch, work.head_kv);
  work.score_descale = score;
  work.value_descale = value;
  if constexpr (Traits::kHasQv)
    work.key_part_scale =
        args.absorbed ? 1.f : args.k_descale.at(work.batch, work.head_kv) / key_descale<Traits>(args, work);
}

/// A warpgroup's rows in the arrays: a row is a position and a head counted from the first of both, and only those
/// within the sequence and within the heads of a KV head exist.
struct RowPlaces {
  int64_t first_row;     // along the row axis of out and lse
  int first_head;        // along their head axis
  int positions, heads;  // that exist
  int64_t batch;         // along their batch axis

  template <class Traits>
  __device__ __forceinline__ static RowPlaces of(const typename Traits::Args& args, const TileHead& work,
                                                 int warpgroup) {
    const int first_query = query_of<Traits>(args, work, warpgroup, 0);
    return {.first_row = int64_t{work.q_begin} + first_query,
            .first_head = work.head_kv * args.packing().ratio + work.first_head,
            .positions = first_query < 0 ? 0 : smaller(args.packing().positions, work.seqlen_q - first_query),
            .heads = smaller(args.packing().heads, args.packing().ratio - work.first_head),
            .batch = args.queries.ragged() ? 0 : work.batch};
  }

  __device__ __forceinline__ bool exist(int position, int head) const { return position < positions && head < heads; }
};

}  // namespace fa3
