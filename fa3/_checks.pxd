from libc.stdint cimport int64_t

from fa3._view cimport ArrayView

cdef enum:
    MAX_NDIM = 8                      # of an ArrayView

# Each returns 0 (or the value), or raises what is said of it in _checks.pyx.
cdef int64_t integer(value, str name, int64_t least, int64_t most=*) except? -2
cdef double number(value, str name) except? -1
cdef double cap(value, str name) except? -1
cdef bint flag(value, str name) except -1
cdef int window(value, int *left, int *right) except -1
cdef int chunk(value) except -1
cdef double probability(value, str name) except? -1
cdef object seed(value, str name)
cdef int needs(array, str name, needed, str needed_name) except -1
cdef int together(first, str first_name, second, str second_name) except -1
cdef int without(array, str name, other, str other_name) except -1
cdef int ndim(ArrayView view, str name, int needed, str axes) except -1
cdef int dtype(ArrayView view, str name, tuple allowed) except -1
cdef int same_dtype(ArrayView view, str name, ArrayView other, str other_name) except -1
cdef int shape(ArrayView view, str name, int needed_ndim, const int64_t *needed, str axes) except -1
cdef int same_size(int64_t size, str name, str axis, int64_t other_size, str other_name) except -1
cdef int contiguous_rows(ArrayView view, str name) except -1
cdef int no_overlap(ArrayView view, str name) except -1
cdef int apart(ArrayView view, str name, ArrayView other, str other_name) except -1
cdef int fits(int64_t size, str name, str axis) except -1
cdef int head_dims(int64_t head_dim, int64_t head_dim_v, str q_dtype, bint has_qv, str v_name) except -1
cdef int quantized_head_dim(int64_t head_dim) except -1

cdef bint empty(ArrayView view) noexcept
