// Where the query tiles of each sequence lie among those of all.
#pragma once
#include <cstdint>

#include "arch/host_device.h"
#include "attention/seqlen.h"

namespace fa3 {

/// Query tiles of a batch, one sequence after the other. A ragged one's places follow from its first row alone, without
/// a sum over those before it: some places between sequences stay empty, and none is used twice.
struct QueryTiles {
  Lengths lengths;
  int tile_m;

  FA3_HOST_DEVICE int first(int batch) const {
    if (!lengths.ragged()) return batch * ceil_div(lengths.rows, tile_m);
    return clamped(lengths.cu_seqlens[batch], 0, lengths.rows) / tile_m + batch;
  }

  /// All of them, or at least as many. Device memory may say what it wants: no sequence reaches past this.
  FA3_HOST_DEVICE int64_t count(int batch) const {
    const int64_t most = ceil_div(lengths.rows, tile_m);
    return lengths.ragged() ? most + batch : most * batch;
  }

  /// The last sequence whose places begin at or before `tile`.
  FA3_HOST_DEVICE int sequence(int tile, int batch) const {
    if (!lengths.ragged()) return tile / ceil_div(lengths.rows, tile_m);
    int low = 0, high = batch;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first(middle) <= tile)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace fa3
