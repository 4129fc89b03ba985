// The kernels of quantisation for tests/emulated.py.
#include "quantize_kernels.h"
