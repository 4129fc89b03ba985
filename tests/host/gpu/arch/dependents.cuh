// src/arch/dependents.cuh on the emulated GPU, where kernels run one after the other.
#pragma once

namespace fa3::arch {

inline void launch_dependents() {}
inline void wait_for_prerequisites() {}

}  // namespace fa3::arch
