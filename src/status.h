#pragma once
#include "fa3.h"

namespace fa3 {

/// Record a sentence for fa3_last_error() on this thread and return the code.
__attribute__((format(printf, 2, 3))) fa3_status fail(fa3_status code, const char* format, ...);

/// The same for a CUDA call that returned `error` (a cudaError_t or CUresult); 0 is success and records nothing.
fa3_status check_cuda(int error, const char* call, const char* reason);

/// Forget what this thread failed at: every entry point begins with it.
void clear_error();

}  // namespace fa3
