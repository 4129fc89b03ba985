// The shapes of the quantisation kernels, and which of them a call takes.
#pragma once
#include "attention/hadamard.h"
#include "fa3.h"
#include "kernels/quantize_args.h"

namespace fa3 {

/// The shapes of the quantisation kernel, and what a thread block of each can hold.
struct QuantizeKind {
  int dtype;      // fa3_dtype of x
  bool hadamard;  // rotated values are kept in fp32: they are dearer to make again than to hold
  int columns;    // groups of 8 elements that a thread has of a row: 1 or 2, or 3 of more than 256
  int rows;       // and of how many rows: 1, or for large units more, so that an element takes fewer instructions

  constexpr bool large() const { return rows > 1 || columns == 3; }
  /// Units may go through as one stream. A rotation has so much to do that it gains nothing by it.
  constexpr bool streams() const { return large() && !hadamard; }
  constexpr int slots() const { return columns * rows; }
  /// Threads of a multiprocessor, as registers allow.
  constexpr int max_threads() const {
    if (large()) return hadamard ? 256 : 512;
    return !hadamard ? 1024 : columns == 1 ? 768 : 512;
  }
  /// Of a thread block. A small unit is a small block's own: what it leaves idle in the last step of a larger one is
  /// more. A large one is that of blocks with a multiprocessor each: the fewer they are, the sooner they have met.
  constexpr int threads() const {
    int threads = large() ? max_threads() : 128;
    while (place_bytes(threads) * kMaxPlaces > kMaxPlacesBytes) threads /= 2;
    return threads;
  }
  /// Threads of a block that a kernel is compiled for, and blocks of a multiprocessor that its registers must allow: of
  /// small ones as many as do without spills, since 84 sequences of 16 heads are 10 for each multiprocessor.
  constexpr int bound() const { return large() ? max_threads() : threads(); }
  constexpr int min_blocks() const {
    if (large()) return 1;
    if (hadamard) return columns == 1 ? 8 : 4;
    return dtype == FA3_FLOAT32 ? 8 : 12;
  }
  /// Bytes that 8 elements take in shared memory, and in x.
  constexpr int group_bytes() const { return hadamard ? 32 : loaded_bytes(); }
  constexpr int loaded_bytes() const { return dtype == FA3_FLOAT32 ? 32 : 16; }
  constexpr int place_bytes(int threads) const { return group_bytes() * slots() * threads; }
  /// Steps whose loads are on their way at a time: 48 KiB a multiprocessor and more, as the rate of memory asks for.
  constexpr int ring() const { return large() && max_threads() * slots() * loaded_bytes() >= 32 << 10 ? 2 : 3; }
  constexpr int max_places() const {
    // Of 228 KiB the system takes 1 KiB a block, and the kernel's own variables less than 2.
    const int places = (228 * 1024 / (max_threads() / threads()) - 3 * 1024) / place_bytes(threads());
    return places < kMaxPlaces ? places : kMaxPlaces;
  }
  /// Lanes that have a row: groups of 8 lie side by side in the lanes, and then in the columns.
  constexpr int row_lanes(int head_dim) const { return columns < 3 ? head_dim / 8 / columns : 32; }
};

/// The kernel for a rotation of 16-bit rows that lie along one axis and that TMA can bring. A step is a tile of 64
/// rows, and a warpgroup's; this is what a thread block holds.
struct RotationTile {
  int head_dim;

  static constexpr int kRows = 64, kChunkDims = 64;
  static constexpr bool fits(int head_dim) {
    return head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 192 || head_dim == 256;
  }
  constexpr int warpgroups() const { return head_dim <= 128 ? 3 : 2; }  // as registers allow
  static constexpr int kServants = 4;                                   // warps that load, tell and gather
  constexpr int threads() const { return 128 * warpgroups() + 32 * kServants; }
  constexpr int block() const { return hadamard_block(0, head_dim); }  // the first of the rotation
  constexpr int chunks() const { return block() / kChunkDims; }        // of it
  constexpr int rest() const { return head_dim - block(); }
  constexpr int tile_bytes() const { return 2 * kRows * head_dim; }
  constexpr int matrix_bytes() const {
    const int bytes = 2 * (kChunkDims * block() + rest() * rest());
    return (bytes + 1023) / 1024 * 1024;
  }
  constexpr int places() const { return (225 * 1024 - matrix_bytes()) / tile_bytes(); }  // 2 KiB are the kernel's own
  /// Of a stream, tiles whose loads are on their way, and those that may wait for their unit's amax meanwhile.
  constexpr int under_way() const { return ((48 << 10) + tile_bytes() - 1) / tile_bytes(); }
  constexpr int held() const { return places() - under_way(); }
  /// Where units go one by one, a place is always the same warpgroup's, and some are a ring for what finds none: with
  /// more of them, so much is on its way that amax comes later.
  constexpr int unit_places() const { return places() / warpgroups() * warpgroups(); }
  constexpr int unit_ring() const {
    const int turn = warpgroups() * tile_bytes();
    return ((96 << 10) + turn - 1) / turn * warpgroups();
  }
  constexpr int bytes() const { return matrix_bytes() + places() * tile_bytes(); }
};

/// How a call is cut up: everything in the arguments but the ticket and the workspace's addresses. Calls no CUDA.
struct QuantizePlan {
  QuantizeKind kind;
  int tile_dim;  // head dim of the kernel that rotates tiles, or 0: it is the one of `kind`
  QuantizeArgs args;
  size_t workspace;  // bytes

  /// Of the workspace, in front of its counters.
  constexpr size_t part_words() const { return size_t(args.units) * args.blocks_per_group * kPartWords; }
  /// Whether blocks leave parts, for each other or for a warp of their own.
  constexpr bool has_parts() const { return args.blocks_per_group > 1 || (args.unit_steps > 0 && !tile_dim); }
};

}  // namespace fa3
