#pragma once
#include <cstdint>

namespace fa3 {

/// A number that no other call of this process has, and hardly one of another: see arch/counter.cuh.
uint64_t draw_ticket();

}  // namespace fa3
