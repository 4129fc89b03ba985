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
    return cu_seqlens ? between(cu_seqlens[batch], cu_seqlens[batch + 1], batch) : dense_span(batch);
  }

  /// The same of a batch that is not ragged.
  FA3_HOST_DEVICE Span dense_span(int batch) const { return in_use({0, rows}, batch); }

  /// The same in two parts: what memory says, and what that comes to.
  FA3_HOST_DEVICE int rows_used(int batch) const { return seqused ? seqused[batch] : rows; }
  FA3_HOST_DEVICE Span dense_span_of(int used) const { return {0, clamped(used, 0, rows)}; }

  /// The same of a ragged batch, for who has read cu_seqlens.
  FA3_HOST_DEVICE Span between(int first, int end, int batch) const {
    const int begin = clamped(first, 0, rows);
    return in_use({begin, clamped(end, begin, rows) - begin}, batch);
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

 private:
  FA3_HOST_DEVICE Span in_use(const Span& all, int batch) const {
    return {all.begin, seqused ? clamped(seqused[batch], 0, all.length) : all.length};
  }
};

}  // namespace fa3
