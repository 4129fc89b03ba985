// Counters in memory that nobody has zeroed: a memset before a launch costs more than most short calls can spare.
#pragma once
#include <cstdint>

namespace fa3::arch {

/// A counter that starts at 0 for each holder of a new ticket, whatever the memory held before: its upper 40 bits are
/// the ticket that it counts for. Tickets are scrambled and never come twice, so memory does not hold one by chance;
/// and who counts to the end sets the word back, so that a graph may be replayed with the same ticket.
class Counter {
 public:
  static constexpr int kCountBits = 24;

  __device__ __forceinline__ Counter(uint64_t* word, uint64_t ticket) : word_(word), ticket_(ticket << kCountBits) {}

  /// Once before a thread's first add(). Whoever comes first starts the count.
  __device__ __forceinline__ void open() const {
    const unsigned long long found = *reinterpret_cast<volatile unsigned long long*>(word_);
    if ((found ^ ticket_) >> kCountBits) atomicCAS(reinterpret_cast<unsigned long long*>(word_), found, ticket_);
  }

  /// The count before this.
  __device__ __forceinline__ int add() const {
    return static_cast<int>(atomicAdd(reinterpret_cast<unsigned long long*>(word_), 1ull)) & ((1 << kCountBits) - 1);
  }

  /// The same, after all that this thread, or another before a barrier with it, has written, and before what any of
  /// them reads behind the next barrier. One instruction: fences around add() would each wait for memory once more.
  __device__ __forceinline__ int add_in_order() const {
    unsigned long long found;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;"
                 : "=l"(found)
                 : "l"(__cvta_generic_to_global(word_))
                 : "memory");
    return static_cast<int>(found) & ((1 << kCountBits) - 1);
  }

  __device__ __forceinline__ void close() const { *reinterpret_cast<volatile unsigned long long*>(word_) = 0; }

 private:
  uint64_t* word_;
  uint64_t ticket_;
};

}  // namespace fa3::arch
