// key -> launcher, over the table that Meson generates.
#include "variants.h"

namespace fa3 {

#define FA3_FORWARD_VARIANT(name, dtype, ...) ForwardVariant name();
#include "forward_variants.h"
#undef FA3_FORWARD_VARIANT

std::span<const ForwardVariant> forward_variants() {
#define FA3_FORWARD_VARIANT(name, dtype, ...) name(),
  static const ForwardVariant table[] = {
#include "forward_variants.h"
  };
#undef FA3_FORWARD_VARIANT
  return table;
}

#define FA3_BACKWARD_VARIANT(name) BackwardVariant name();
#include "backward_variants.h"
#undef FA3_BACKWARD_VARIANT

std::span<const BackwardVariant> backward_variants() {
#define FA3_BACKWARD_VARIANT(name) name(),
  static const BackwardVariant table[] = {
#include "backward_variants.h"
  };
#undef FA3_BACKWARD_VARIANT
  return table;
}

}  // namespace fa3
