// Where a sequence's rows lie.
#pragma once
#include "arch/host_device.h"

namespace fa3 {

/// Rows [begin, begin + length) along the sequence axis.
struct Span {
  int begin, length;
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
};

}  // namespace fa3
