// Status codes as text, and the last failure of each thread.
#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace fa3 {
namespace {
thread_local char last_error[512];
thread_local int last_cuda_error;
}  // namespace

fa3_status fail(fa3_status code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return code;
}

fa3_status check_cuda(int error, const char* call, const char* reason) {
  if (error == 0) return FA3_OK;
  last_cuda_error = error;
  return fail(FA3_ERROR_CUDA, "%s: %s (CUDA error %d)", call, reason, error);
}

void clear_error() {
  last_error[0] = '\0';
  last_cuda_error = 0;
}

}  // namespace fa3

extern "C" const char* fa3_last_error(void) { return fa3::last_error; }
extern "C" int fa3_last_cuda_error(void) { return fa3::last_cuda_error; }

extern "C" const char* fa3_status_string(int status) {
  switch (status) {
    case FA3_OK:
      return "ok";
    case FA3_ERROR_NULL:
      return "null pointer";
    case FA3_ERROR_HEAD_DIM:
      return "unsupported head dim";
    case FA3_ERROR_HEAD_DIM_FP8:
      return "unsupported head dim for fp8";
    case FA3_ERROR_DTYPE:
      return "wrong dtype";
    case FA3_ERROR_SHAPE:
      return "wrong shape or value";
    case FA3_ERROR_CU_SEQLENS:
      return "wrong cumulative lengths";
    case FA3_ERROR_WORKSPACE:
      return "workspace needed";
    case FA3_ERROR_NO_FP8:
      return "fp8 is not built";
    case FA3_ERROR_NO_PAGED_CACHE:
      return "the paged cache is not built";
    case FA3_ERROR_NO_CACHE_UPDATE:
      return "updating a cache is not built";
    case FA3_ERROR_NO_SPLIT:
      return "splitting along keys is not built";
    case FA3_ERROR_NO_QV:
      return "qv is not built";
    case FA3_ERROR_NO_BACKWARD:
      return "the backward pass is not built";
    case FA3_ERROR_NO_DROPOUT:
      return "dropout is not built";
    case FA3_ERROR_DEVICE:
      return "unsupported device";
    case FA3_ERROR_CUDA:
      return "CUDA error";
    default:
      return "unknown status";
  }
}
