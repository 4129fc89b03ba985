// Which keys a query sees, and what that makes of a tile: which blocks of keys it needs, which of them need masking.
#pragma once
#include "arch/host_device.h"

namespace fa3 {

/// Keys [begin, end) of a sequence; empty when end <= begin.
struct KeyInterval {
  int begin, end;
};

/// The same of its queries.
struct QueryInterval {
  int begin, end;
};

/// The mask as numbers. A query at position p sees keys p - left .. p + right, and those of its own chunk.
struct Visibility {
  static constexpr int kUnbounded = 1 << 30;
  int left, right;  // kUnbounded, or at most that
  int chunk;        // 0: none; at most kUnbounded

  /// Without bounds the interval does not depend on the query.
  FA3_HOST_DEVICE bool full() const { return left == kUnbounded && right == kUnbounded && chunk == 0; }

  /// With both it has as many keys for every query, but for those near the sequence's ends.
  FA3_HOST_DEVICE bool window() const { return left != kUnbounded && right != kUnbounded && chunk == 0; }

  /// Keys that query `row` sees, of a sequence of these lengths. Both ends are monotone in `row`.
  FA3_HOST_DEVICE KeyInterval keys(int row, int seqlen_q, int seqlen_k) const {
    const int position = row + seqlen_k - seqlen_q;
    KeyInterval seen{0, seqlen_k};
    if (left != kUnbounded) seen.begin = larger(0, position - left);
    if (right != kUnbounded) seen.end = smaller(seqlen_k, position + right + 1);
    if (chunk) {
      const int start = (position - (position < 0 ? chunk - 1 : 0)) / chunk * chunk;  // rounds down
      seen.begin = larger(seen.begin, start);
      if (start < seqlen_k - chunk) seen.end = smaller(seen.end, start + chunk);
    }
    return seen;
  }

  /// Queries that see key `key`. Both ends are monotone in `key`.
  FA3_HOST_DEVICE QueryInterval queries(int key, int seqlen_q, int seqlen_k) const {
    if (key >= seqlen_k) return {seqlen_q, seqlen_q};
    const int row = key - seqlen_k + seqlen_q;  // the query at the key's own position
    QueryInterval seeing{0, seqlen_q};
    if (right != kUnbounded) seeing.begin = larger(0, row - right);
    if (left != kUnbounded) seeing.end = smaller(seqlen_q, row + left + 1);
    if (chunk) {
      const int start = row - key % chunk;
      seeing.begin = larger(seeing.begin, start);
      if (start < seqlen_q - chunk) seeing.end = smaller(seeing.end, start + chunk);
    }
    return seeing;
  }
};

/// Blocks of tile_n keys that a group of query rows needs. Blocks [begin, end) hold a key that some row sees; every row
/// sees all of the blocks [plain_begin, plain_end). Blocks are taken from the last to the first, so `settled` counts
/// too: once the blocks [settled, end) are done, each row has met its last key, if it has any.
struct BlockRange {
  int begin, end;
  int plain_begin, plain_end;
  int settled;

  FA3_HOST_DEVICE int count() const { return end - begin; }
  FA3_HOST_DEVICE bool needs_mask(int block) const { return block < plain_begin || block >= plain_end; }

  /// What of it lies in [first, last): the blocks of one part of a tile. An empty range stands at `first`.
  FA3_HOST_DEVICE void clip(int first, int last) {
    begin = larger(begin, first);
    end = smaller(end, last);
    if (begin >= end) begin = end = first;
    settled = clamped(settled, begin, end);
  }
};

/// The range for queries that see all of seqlen_k keys.
template <int kTileN>
FA3_HOST_DEVICE BlockRange every_block(int seqlen_k) {
  const int end = ceil_div(seqlen_k, kTileN);
  return {0, end, 0, seqlen_k / kTileN, larger(end - 1, 0)};
}

/// The range for query rows [first, last] (both inside the sequence).
template <int kTileN>
FA3_HOST_DEVICE BlockRange block_range(const Visibility& visibility, int first, int last, int seqlen_q, int seqlen_k) {
  const KeyInterval top = visibility.keys(first, seqlen_q, seqlen_k),
                    bottom = visibility.keys(last, seqlen_q, seqlen_k);
  BlockRange range;
  range.begin = top.begin / kTileN;
  range.end = larger(range.begin, ceil_div(larger(bottom.end, 0), kTileN));
  range.plain_begin = ceil_div(bottom.begin, kTileN);
  range.plain_end = larger(top.end, 0) / kTileN;
  range.settled = clamped((larger(top.end, 1) - 1) / kTileN, range.begin, range.end);
  return range;
}

/// Blocks of queries that a block of keys needs, [begin, end); every key of it is seen by all of [plain_begin,
/// plain_end).
struct QueryBlockRange {
  int begin, end;
  int plain_begin, plain_end;

  FA3_HOST_DEVICE int count() const { return end - begin; }
  FA3_HOST_DEVICE bool needs_mask(int block) const { return block < plain_begin || block >= plain_end; }
};

/// The range for keys [first, last], of which at least the first is inside the sequence; keys behind its end are seen
/// by none. Queries behind their end count as if they saw all: they have an lse that makes their probabilities 0.
template <int kTileM>
FA3_HOST_DEVICE QueryBlockRange query_block_range(const Visibility& visibility, int first, int last, int seqlen_q,
                                                  int seqlen_k) {
  const QueryInterval top = visibility.queries(first, seqlen_q, seqlen_k),
                      bottom = visibility.queries(smaller(last, seqlen_k - 1), seqlen_q, seqlen_k);
  QueryBlockRange range;
  range.begin = top.begin / kTileM;
  range.end = larger(range.begin, ceil_div(larger(bottom.end, 0), kTileM));
  range.plain_begin = last < seqlen_k ? ceil_div(bottom.begin, kTileM) : range.end;
  range.plain_end = top.end == seqlen_q ? range.end : larger(top.end, 0) / kTileM;
  return range;
}

/// The first block of keys that any query from `first` on sees: whose turn comes first in adding to their dq.
template <int kTileN>
FA3_HOST_DEVICE int first_key_block(const Visibility& visibility, int first, int seqlen_q, int seqlen_k) {
  return visibility.keys(first, seqlen_q, seqlen_k).begin / kTileN;
}

/// An empty range at `block`: a warpgroup without work in a tile of others.
FA3_HOST_DEVICE BlockRange no_blocks(int block) { return {block, block, block, block, block}; }

}  // namespace fa3
