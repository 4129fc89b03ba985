cimport cython
from libc.stdint cimport int64_t, uintptr_t

from fa3._dlpack cimport DLPackExchangeAPI, DLTensor


@cython.final
cdef class ArrayView:
    cdef readonly object owner        # keeps the memory alive
    cdef public uintptr_t data        # address of element (0, …); may be 0 when the array is empty
    cdef readonly int ndim
    cdef int64_t[8] c_shape
    cdef int64_t[8] c_strides         # in elements
    cdef readonly str dtype           # "float16", "bfloat16", "float8_e4m3fn" …
    cdef readonly int itemsize
    cdef readonly int device_type     # DLPack's: 1 CPU (pinned too), 2 CUDA (managed too)
    cdef readonly int device_id
    cdef readonly bint readonly

cdef enum Route:                      # how a type of array is read
    NDARRAY
    EXCHANGE
    ATTRIBUTES
    DLPACK
    INTERFACE


@cython.final
cdef class Kind:                      # what is known of a type of array
    cdef type kind
    cdef Route route
    cdef readonly str framework       # "numpy", "torch", "cupy", "jax", "numba"; "" for others
    cdef bint torch                   # framework is "torch"
    cdef bint jax                     # framework is "jax"
    cdef object is_neg                # torch.Tensor.is_neg: DLPack does not tell of that bit
    cdef const DLPackExchangeAPI *exchange
    cdef str refusal                  # why such arrays cannot be taken; None where they can

cdef Kind kind_of(type kind)
cdef ArrayView read_ndarray(array, str name)
cdef ArrayView read_exchange(Kind kind, array, str name)
cdef ask(array, str name, str method, dict options)
cdef ArrayView read_dlpack(array, str name, stream)
cdef ArrayView read_parts(parts, array, str name)
cdef int set_tensor(ArrayView view, DLTensor *tensor, array, str name) except -1
cdef int set_device(ArrayView view, int device_type, int device_id, str name) except -1
cdef int check_memory(ArrayView view, array, str name) except -1
cdef int check_written(ArrayView view, array, str name) except -1
cdef int pending() except -1
cdef int refused(array, str name) except -1
cdef str device_text(int device_type, int device_id)
cdef str type_text(array)
