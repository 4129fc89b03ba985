#pragma once
#include <span>

#include "kernels/variant.h"

namespace fa3 {

std::span<const ForwardVariant> forward_variants();
std::span<const BackwardVariant> backward_variants();

}  // namespace fa3
