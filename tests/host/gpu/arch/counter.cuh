// src/arch/counter.cuh on the emulated GPU.
#pragma once
#include "emulated.h"

namespace fa3::arch {

class Counter {
 public:
  static constexpr int kCountBits = 24;
  Counter(uint64_t* word, uint64_t ticket) : word_(word), ticket_(ticket << kCountBits) {}
  void open() const {
    if ((*word_ ^ ticket_) >> kCountBits) *word_ = ticket_;
  }
  int add() const { return static_cast<int>((*word_)++) & ((1 << kCountBits) - 1); }
  int add_in_order() const { return add(); }
  void close() const { *word_ = 0; }

 private:
  uint64_t* word_;
  uint64_t ticket_;
};

}  // namespace fa3::arch
