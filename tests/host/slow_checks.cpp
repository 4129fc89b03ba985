// src/slow_checks.cpp without CUDA, for tests/test_slow_checks.py: device memory is the host's.
#include "slow_checks.h"

extern "C" int check_slowly(const fa3_forward_params* params) { return fa3::slow_checks(*params, nullptr); }
