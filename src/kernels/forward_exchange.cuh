// Two warpgroups that share rows: each has summed up the scores over half of the columns.
#pragma once
#include "arch/barrier.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/forward_traits.cuh"

namespace fa3 {

/// Thread t of one warpgroup and thread t of the other have the same rows and keys of the scores, so what they tell
/// each other is for one thread alone. There are two boxes of 64 bytes for every such pair: in the place where output
/// is staged, and in that of Q, whose columns are in registers by then. Q of 8 bits has too few bytes: there the second
/// boxes have a place of their own.
template <class Traits, bool = Traits::kHasQv>
class Exchange {
 public:
  __device__ __forceinline__ explicit Exchange(ForwardShared<Traits>&) {}
};

template <class Traits>
class Exchange<Traits, true> {
  static constexpr int kWords = 16, kScores = Traits::kTileN / 2;  // of a box; of a thread
  static_assert(kScores == 2 * kWords, "scores go in two letters");
  static constexpr int kBoxBytes = 128 * kWords * 4;
  static_assert(Traits::kStagingBytes >= kBoxBytes, "the boxes have room where nothing else is needed meanwhile");
  static_assert((Traits::kEightBits ? Traits::kLetterBytes : Traits::TileQ::kBytes) >= kBoxBytes &&
                    Traits::kQueryStages == 1 && Traits::kQuerySteps == Traits::kOwnColumnSteps,
                "so have the second ones");

 public:
  __device__ __forceinline__ explicit Exchange(ForwardShared<Traits>& shared) : shared_(shared) {}

  /// Before a tile's first scores: until both warpgroups have their part of Q, and staged no more of the last output.
  __device__ __forceinline__ void open() const { arch::barrier_sync(kBothBarrier, 256); }

  /// Behind a tile's last scores: Q may be loaded, and output staged.
  __device__ __forceinline__ void close() const {
    arch::fence_async_proxy();
    arch::barrier_sync(kBothBarrier, 256);
  }

  /// Add the other warpgroup's sums to `s`: both get the same. A thread's first letter goes to one box, its second to
  /// the one where it found the other's first. So a box is written by whoever read it last, and each letter takes one
  /// barrier, of the two warps.
  __device__ __forceinline__ void add_others(float (&s)[kScores]) const {
    // Found anew each time: beside the products there are no registers for it.
    const uint32_t thread = arch::thread_anew();
    float4* const first = box(thread / 128 == 0, thread);
    float4* const second = box(thread / 128 != 0, thread);
    put(first, s);
    sync();
    add(second, s);
    put(second, s + kWords);
    sync();
    add(first, s + kWords);
  }

 private:
  // Named barriers behind those of the consumers: of each pair of warps, and of all.
  static constexpr int kPairBarrier = 1 + 2 * Traits::kConsumers, kBothBarrier = kPairBarrier + 4;

  /// A thread's box in the one place or in the other.
  __device__ __forceinline__ float4* box(bool with_q, uint32_t thread) const {
    void* place = shared_.staging;
    if constexpr (Traits::kEightBits) {
      if (with_q) place = shared_.letters;
    } else {
      if (with_q) place = shared_.q;
    }
    return static_cast<float4*>(place) + thread % 128;
  }

  __device__ __forceinline__ static void sync() { arch::barrier_sync(kPairBarrier + threadIdx.x / 32 % 4, 64); }

  __device__ __forceinline__ static void put(float4* box, const float* words) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i)
      box[128 * i] = make_float4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }

  __device__ __forceinline__ static void add(const float4* box, float* words) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const float4 letter = box[128 * i];
      words[4 * i] += letter.x;
      words[4 * i + 1] += letter.y;
      words[4 * i + 2] += letter.z;
      words[4 * i + 3] += letter.w;
    }
  }

  ForwardShared<Traits>& shared_;
};

}  // namespace fa3
