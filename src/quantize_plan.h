#pragma once
#include "fa3.h"
#include "kernels/quantize_args.h"

namespace fa3 {

inline constexpr int kQuantizeThreads = 128;

/// The shapes of the quantisation kernel, and what a thread block of each can hold.
struct QuantizeKind {
  int dtype;      // fa3_dtype of x
  bool hadamard;  // rotated values are kept in fp32: they are dearer to make again than to hold
  int slots;      // groups of 8 elements that a thread has of a row: 1 to 3

  /// Resident on a multiprocessor: 64 or 128 registers a thread.
  constexpr int blocks_per_sm() const { return slots == 1 || (slots == 2 && !hadamard) ? 8 : 4; }
  /// Bytes that 8 elements take in shared memory.
  constexpr int group_bytes() const { return hadamard || dtype == FA3_FLOAT32 ? 32 : 16; }
  constexpr int place_bytes() const { return group_bytes() * slots * kQuantizeThreads; }
  constexpr int max_places() const {
    // Of 228 KiB the system takes 1 KiB a block, and the kernel's own variables a little. More than 48 KiB a block
    // would have to be asked for at every launch.
    const int share = 228 * 1024 / blocks_per_sm() - 1024, most = share < 48 * 1024 ? share : 48 * 1024;
    return (most - 128) / place_bytes();
  }
  /// Lanes that have a row: groups of 8 lie side by side in the lanes, and then in the slots.
  constexpr int row_lanes(int head_dim) const {
    return slots == 1 ? head_dim / 8 : head_dim <= 256 ? head_dim / 8 / slots : 32;
  }
  /// Rows of a step of a thread block.
  constexpr int step_rows(int head_dim) const { return kQuantizeThreads / 32 * (32 / row_lanes(head_dim)); }
};

QuantizeKind quantize_kind(const fa3_quantize_params& params);

/// How a call is cut up: everything in the arguments but the ticket and the workspace's addresses. Calls no CUDA.
struct QuantizePlan {
  QuantizeKind kind;
  QuantizeArgs args;
  size_t arrivals_bytes, parts_bytes;  // of the workspace, in this order
  size_t workspace() const { return arrivals_bytes + parts_bytes; }
};
QuantizePlan plan_quantize(const fa3_quantize_params& params, int num_sms);

}  // namespace fa3
