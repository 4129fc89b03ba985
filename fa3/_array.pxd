cimport cython
from libc.stdint cimport int64_t, uintptr_t

from fa3._view cimport ArrayView, Kind


@cython.final
cdef class Output:                    # an array for a result
    cdef readonly ArrayView view      # to be written
    cdef object _array
    cdef object _finish               # makes what the caller receives of _array; None: that is _array itself
    cpdef object array(self)


@cython.final
cdef class Border:
    cdef readonly ArrayView view
    cdef readonly str name
    cdef readonly int device_type
    cdef readonly int device_id
    cdef readonly uintptr_t stream
    cdef readonly bint stream_given
    cdef readonly str framework
    cdef readonly bint retyped
    cdef readonly list held
    cdef Kind kind
    cdef object like
    cdef object asked                 # the stream= that was given
    cdef bint placed                  # the device is known
    cdef bint opened                  # the stream is known
    cdef uintptr_t native             # the stream that the framework's C allocator allocates for
    cdef uintptr_t followed           # the last stream that ours was ordered behind; ours, to begin with
    cdef uintptr_t current            # the current stream of the framework of the last array, of type `current_of`
    cdef Kind current_of

    cpdef ArrayView take(self, array, str name, dtype=*, bint writable=*, bint same_device=*)
    cpdef Output wrap(self, array, str name)
    cdef Output make(self, int ndim, const int64_t *shape, str dtype)
    cdef int begin(self, array, str name, stream, dtype) except -1
    cdef int allocate(self, Output output, int ndim, const int64_t *shape, str dtype) except -1
    cdef ArrayView read(self, array, str name, bint same_device)
    cdef ArrayView read_torch(self, Kind kind, array, str name, bint same_device)
    cdef ArrayView read_protocol(self, Kind kind, array, str name, bint same_device)
    cdef ArrayView read_interface(self, Kind kind, array, str name, bint same_device)
    cdef bint place(self, int device_type, int device_id, str name, bint same_device) except -1
    cdef void open(self, uintptr_t current) noexcept
    cdef int follow(self, uintptr_t producer, Kind kind, array) except -1

cdef Border border_of(array, str name, stream, dtype)
