// Where a sequence's rows lie.
#pragma once
#include <cstdint>

#include "arch/host_device.h"

namespace fa3 {

/// Rows [begin, begin + length) along the sequence axis.
struct Span {
  int begin, length;
};

/// A row of a batch: whose it is, which of the sequence's rows, and whether the sequence uses it.
struct RowOwner {
  int batch, row;
  bool used;
};

/// The lengths of a batch; see fa3_lengths. Whatever the device arrays say, a span stays inside [0, rows).
struct Lengths {
  int rows;
  const int* cu_seqlens;  // (batch + 1), or null: dense
  const int* seqused;     // (batch), or null

  FA3_HOST_DEVICE bool ragged() const { return cu_seqlens != nullptr; }

  FA3_HOST_DEVICE Span span(int batch) const {
    Span s{0, rows};
    if (cu_seqlens) {
      s.begin = clamped(cu_seqlens[batch], 0, rows);
      s.length = clamped(cu_seqlens[batch + 1], s.begin, rows) - s.begin;
    }
    if (seqused) s.length = clamped(seqused[batch], 0, s.length);
    return s;
  }

  /// The owner of a row, counted along all rows of a ragged batch or of all entries of a dense one. `batch` > 0.
  FA3_HOST_DEVICE RowOwner owner(int64_t index, int batch) const {
    RowOwner found{0, 0, false};
    if (cu_seqlens) {
      int end = batch;  // the last sequence that does not begin behind the row is in [found.batch, end)
      while (end - found.batch > 1) {
        const int middle = found.batch + (end - found.batch) / 2;
        (cu_seqlens[middle] <= index ? found.batch : end) = middle;
      }
    } else {
      found.batch = static_cast<int>(index / rows);
      index -= int64_t{found.batch} * rows;
    }
    const Span s = span(found.batch);
    found.row = static_cast<int>(index) - s.begin;
    found.used = found.row >= 0 && found.row < s.length;
    return found;
  }
};

}  // namespace fa3
