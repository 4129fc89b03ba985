// A lane on the CPU: what it has is what all have.
#pragma once

namespace fa3::arch {

inline int uniform(int x) { return x; }

}  // namespace fa3::arch
