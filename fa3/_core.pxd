from fa3._array cimport Border
from fa3._problem cimport Problem
from fa3._view cimport ArrayView

cdef int forward(Problem problem, ArrayView out, ArrayView lse) except -1
cdef int backward(Problem problem, ArrayView dout, ArrayView out, ArrayView lse, ArrayView dlse, ArrayView dq,
                  ArrayView dk, ArrayView dv, ArrayView dsinks, bint deterministic) except -1
cdef int combine(Border border, ArrayView parts, ArrayView lse_parts, ArrayView out, ArrayView lse) except -1
cdef int quantize(Border border, ArrayView x, ArrayView codes, ArrayView descale, ArrayView cu_seqlens,
                  bint hadamard) except -1
