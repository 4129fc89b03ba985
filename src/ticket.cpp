// Numbers by which a launch knows its own counters.
#include "ticket.h"

#include <atomic>
#include <random>

namespace fa3 {

uint64_t draw_ticket() {
  static std::atomic<uint64_t> drawn = std::random_device{}();
  constexpr uint64_t kMask = (uint64_t{1} << 40) - 1, kOdd = 0x9E3779B97F4A7C15;  // a product with it is one to one
  const uint64_t product = drawn++ * kOdd & kMask;
  return product ^ product >> 20;
}

}  // namespace fa3
