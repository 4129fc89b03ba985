# cython: language_level=3, boundscheck=False, wraparound=False
"""ArrayView: any array as pointer, shape, strides, dtype and device.

What a type of array can say is looked up once per type, in this order: NumPy's buffers, DLPack's C exchange
API, ``__dlpack__``, ``__cuda_array_interface__``. Nothing here orders streams; `fa3._array` does.
"""
cimport cython
from cpython.buffer cimport PyBUF_RECORDS_RO, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_Occurred
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_SetName
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcpy

from fa3 cimport _fa3
from fa3._dlpack cimport (DL_CPU, DL_CUDA, DL_CUDA_HOST, DL_CUDA_MANAGED, DL_FLAG_IS_COPIED,
                          DL_FLAG_READ_ONLY, DL_FLOAT, DLManagedTensor, DLManagedTensorVersioned, DLPackExchangeAPI,
                          DLTensor)

import sys

import numpy

from fa3 import _dtypes
from fa3._errors import raise_status

cdef extern from "Python.h":
    object PyObject_CallFunctionObjArgs(object callable, ...)

cdef enum:
    MAX_NDIM = 8
    MAX_KINDS = 256

cdef list NAMES = _dtypes.NAMES
cdef int CODES = _dtypes.CODES
cdef int SIZES = _dtypes.SIZES
cdef dict STORAGE = {1: "|u1", 2: "<u2"}
cdef tuple FRAMEWORKS = ("numpy", "torch", "cupy", "jax", "numba")
cdef dict ALIASES = {"jaxlib": "jax", "numba_cuda": "numba"}


@cython.final
cdef class ArrayView:
    """One argument as the layers below see it.

    Shape, strides (in elements) and address are copies; ``owner`` keeps the memory alive.
    """

    @property
    def shape(self):
        return tuple([self.c_shape[i] for i in range(self.ndim)])

    @property
    def strides(self):
        return tuple([self.c_strides[i] for i in range(self.ndim)])

    @property
    def __array_interface__(self):
        if self.device_type != DL_CPU:
            raise AttributeError(f"memory of {device_text(self.device_type, self.device_id)} is not NumPy's")
        dtype = _dtypes.numpy_dtype(self.dtype)
        return {"version": 3, "shape": self.shape, "data": (self.data, self.readonly),
                "typestr": STORAGE[self.itemsize] if dtype.kind == "V" else dtype.str,  # V: ml_dtypes'
                "strides": tuple([self.c_strides[i] * self.itemsize for i in range(self.ndim)])}

    def numpy(self):
        """The same memory as a `numpy.ndarray`; bfloat16 and fp8 are ml_dtypes' there."""
        if self.device_type != DL_CPU:
            raise BufferError(f"memory of {device_text(self.device_type, self.device_id)} is not NumPy's")
        dtype = _dtypes.numpy_dtype(self.dtype)
        array = self.owner if isinstance(self.owner, numpy.ndarray) else numpy.asarray(self)
        if type(array) is not numpy.ndarray:
            array = array.view(numpy.ndarray)
        return array if array.dtype == dtype else array.view(dtype)

    def __repr__(self):
        return f"<ArrayView {self.dtype} {self.shape} on {device_text(self.device_type, self.device_id)}>"


@cython.final
cdef class Managed:
    """A consumed DLPack tensor: its deleter runs when the last view goes."""
    cdef DLManagedTensorVersioned *versioned
    cdef DLManagedTensor *unversioned

    def __dealloc__(self):
        if self.versioned != NULL and self.versioned.deleter != NULL:
            self.versioned.deleter(self.versioned)
        if self.unversioned != NULL and self.unversioned.deleter != NULL:
            self.unversioned.deleter(self.unversioned)


# ---- types of arrays ------------------------------------------------------------------------------------

@cython.final
cdef class Kind:
    pass


cdef dict _kinds = {}


cdef Kind kind_of(type kind):
    """What is known of a type of array; looked up once per type."""
    found = _kinds.get(kind)
    if found is None:
        if len(_kinds) >= MAX_KINDS:  # types that a program keeps making must not live for ever here
            _kinds.clear()
        _kinds[kind] = found = _describe_kind(kind)
    return <Kind>found


cdef Kind _describe_kind(type kind):
    cdef Kind found = Kind.__new__(Kind)
    found.kind = kind
    found.framework = _framework(kind)
    found.torch = found.framework == "torch"
    found.jax = found.framework == "jax"
    found.is_neg = getattr(kind, "is_neg", None) if found.torch else None
    found.refusal = _refusal(kind, found.framework)
    found.exchange = _exchange_api(getattr(kind, "__dlpack_c_exchange_api__", None))
    if issubclass(kind, numpy.ndarray):
        found.route = NDARRAY
    elif found.exchange != NULL:
        found.route = EXCHANGE
    elif found.torch and issubclass(kind, sys.modules["torch"].Tensor):
        found.route = ATTRIBUTES
    elif hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        found.route = DLPACK
    else:
        found.route = INTERFACE
    return found


cdef str _framework(type kind):
    for base in kind.__mro__:
        package = package_of(base)
        package = ALIASES.get(package, package)
        if package in FRAMEWORKS:
            return package
    return ""


cdef str package_of(kind):
    module = kind.__module__  # whatever a class says it is
    return module.partition(".")[0] if isinstance(module, str) else ""


cdef str _refusal(type kind, str framework):
    """Types that speak a protocol, and stand for memory that is elsewhere or nowhere."""
    cdef set names = {base.__name__ for base in kind.__mro__}
    if framework == "torch" and hasattr(kind, "__torch_dispatch__"):
        if kind.__torch_dispatch__ is not sys.modules["torch"].Tensor.__torch_dispatch__:
            return "stands for other tensors; fa3 needs a plain one"
    if framework == "jax" and "Tracer" in names:
        return "is being traced; fa3 runs outside jax.jit and its like"
    if framework == "numpy" and "MaskedArray" in names:
        return "may be masked, which fa3 would not see"
    return None


cdef const DLPackExchangeAPI *_exchange_api(capsule) except? NULL:
    cdef const DLPackExchangeAPI *api
    if not PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        return NULL
    api = <const DLPackExchangeAPI *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    while api != NULL and api.header.version.major != 1:  # newer ones link to the older that they also speak
        api = <const DLPackExchangeAPI *>api.header.prev_api
    return api


# ---- parts of a view ------------------------------------------------------------------------------------

cdef str device_text(int device_type, int device_id):
    return "the CPU" if device_type == DL_CPU else f"cuda:{device_id}"


cdef str type_text(array):
    """An array's type in messages: torch.Tensor, list …"""
    kind = type(array)
    package = package_of(kind)
    if array is None:
        return "None"
    return kind.__name__ if package in ("builtins", "") else f"{package}.{kind.__name__}"


def pointer_device(uintptr_t address):
    """The device that owns an address; −1 for host memory."""
    cdef int device = -1
    cdef int status = _fa3.fa3_pointer_device(<const void *>address, &device)
    if status != 0:
        raise_status(status, _fa3.fa3_status_string(status).decode(), _fa3.fa3_last_error().decode(),
                     _fa3.fa3_last_cuda_error())
    return device


cdef int set_dtype(ArrayView view, int code, int bits, int lanes, str name) except -1:
    cdef int size = 0
    while size < SIZES and 8 << size != bits:
        size += 1
    found = NAMES[code * SIZES + size] if code < CODES and size < SIZES and lanes == 1 else None
    if found is None:
        raise TypeError(f"{name}: unsupported dtype (DLPack's code {code}, {bits} bits, {lanes} lanes)")
    view.dtype = <str>found
    view.itemsize = bits // 8
    return 0


cdef int set_ndim(ArrayView view, Py_ssize_t ndim, str name) except -1:
    if ndim > MAX_NDIM:
        raise ValueError(f"{name}: {ndim} dimensions, but no argument has more than {MAX_NDIM}")
    view.ndim = <int>ndim
    return 0


cdef int set_device(ArrayView view, int device_type, int device_id, str name) except -1:
    if device_type == DL_CUDA_HOST or device_type == DL_CPU:
        device_type, device_id = DL_CPU, 0  # JAX counts several CPU devices, of one memory
    elif device_type == DL_CUDA_MANAGED:
        device_type, device_id = DL_CUDA, pointer_device(view.data) if view.data else 0
    elif device_type != DL_CUDA:
        raise BufferError(f"{name}: on a device of DLPack's type {device_type}; fa3 works on CUDA devices "
                          "and the CPU")
    view.device_type = device_type
    view.device_id = device_id
    return 0


cdef void set_contiguous(ArrayView view) noexcept:
    cdef int64_t stride = 1
    cdef int i
    for i in range(view.ndim - 1, -1, -1):
        view.c_strides[i] = stride
        stride *= view.c_shape[i]


cdef int set_tensor(ArrayView view, DLTensor *tensor, array, str name) except -1:
    set_dtype(view, tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes, name)
    set_ndim(view, tensor.ndim, name)
    memcpy(view.c_shape, tensor.shape, view.ndim * sizeof(int64_t))
    if tensor.strides != NULL:
        memcpy(view.c_strides, tensor.strides, view.ndim * sizeof(int64_t))
    else:
        set_contiguous(view)
    view.data = <uintptr_t>tensor.data + tensor.byte_offset if tensor.data != NULL else 0
    set_device(view, tensor.device.device_type, tensor.device.device_id, name)
    return check_memory(view, array, name)


cdef int check_memory(ArrayView view, array, str name) except -1:
    """An array that says it has elements has them somewhere, at an address that suits them."""
    cdef int i
    if view.data == 0:
        for i in range(view.ndim):
            if view.c_shape[i] == 0:
                return 0
        raise TypeError(f"{name}: this {type_text(array)} has no memory")
    if view.device_type == DL_CUDA and view.data % view.itemsize:
        raise ValueError(f"{name}: address {view.data:#x} is not a multiple of an element's {view.itemsize} "
                         "bytes")
    return 0


cdef int check_written(ArrayView view, array, str name) except -1:
    """An array to be written is writable, and has one address per element."""
    cdef int i
    if view.readonly:
        raise BufferError(f"{name}: this {type_text(array)} is read-only, and would be written")
    for i in range(view.ndim):
        if view.c_shape[i] == 0:
            return 0  # without elements there is nothing to share, whatever the strides say
    for i in range(view.ndim):
        if view.c_strides[i] == 0 and view.c_shape[i] > 1:
            raise ValueError(f"{name}: dimension {i} has stride 0, so that its elements share memory that "
                             "would be written")
    return 0


# ---- the protocols --------------------------------------------------------------------------------------

cdef ArrayView read_ndarray(array, str name):
    cdef ArrayView view = ArrayView.__new__(ArrayView)
    cdef Py_buffer buffer
    cdef str dtype = None
    cdef int i
    view.owner = array
    try:
        PyObject_GetBuffer(array, &buffer, PyBUF_RECORDS_RO)
    except (BufferError, ValueError):  # ml_dtypes' types have none: take the bytes, and the name from NumPy
        dtype = array.dtype.name
        if dtype not in _dtypes.CODE_OF:
            raise TypeError(f"{name}: dtype {dtype} is not supported") from None
        PyObject_GetBuffer(array.view(f"u{array.itemsize}"), &buffer, PyBUF_RECORDS_RO)
    try:
        set_format(view, buffer.format, buffer.itemsize, array, name)
        if dtype is not None:
            view.dtype = sys.intern(dtype)
        set_ndim(view, buffer.ndim, name)
        for i in range(view.ndim):
            view.c_shape[i] = buffer.shape[i]
            view.c_strides[i] = buffer.strides[i] // buffer.itemsize
            if view.c_strides[i] * buffer.itemsize != buffer.strides[i]:
                raise ValueError(f"{name}: strides of {array.strides} bytes are not whole numbers of "
                                 f"elements of {array.itemsize}")
        view.data = <uintptr_t>buffer.buf
        view.readonly = buffer.readonly
        view.device_type = DL_CPU
    finally:
        PyBuffer_Release(&buffer)  # the array itself, which owner keeps, holds the memory
    return view


cdef int set_format(ArrayView view, const char *format, Py_ssize_t itemsize, array, str name) except -1:
    """The dtype from a buffer's format: one type in the machine's byte order, aligned or not."""
    cdef int code = -1
    if format[0] in b"@=^":
        format += 1
    if format[0] != 0 and format[1] == 0:  # not several fields, not a byte-order mark
        if format[0] in b"efd":
            code = 2
        elif format[0] in b"bhilq":
            code = 0
        elif format[0] in b"BHILQ":
            code = 1
        elif format[0] == c"?":
            code = 6
    if code < 0:
        raise TypeError(f"{name}: dtype {array.dtype} is not supported")
    return set_dtype(view, code, <int>itemsize * 8, 1, name)


cdef ArrayView read_exchange(Kind kind, array, str name):
    cdef ArrayView view = ArrayView.__new__(ArrayView)
    cdef DLTensor tensor
    cdef Managed managed
    if kind.exchange.dltensor_from_py_object_no_sync != NULL:
        if kind.exchange.dltensor_from_py_object_no_sync(<void *>array, &tensor) != 0:
            refused(array, name)
        view.owner = array  # tensor's shape and strides are lent until we return; the array holds the memory
    else:
        managed = Managed.__new__(Managed)
        if kind.exchange.managed_tensor_from_py_object_no_sync(<void *>array, &managed.versioned) != 0:
            refused(array, name)
        tensor = managed.versioned.dl_tensor
        view.owner = managed
        view.readonly = managed.versioned.flags & DL_FLAG_READ_ONLY
    set_tensor(view, &tensor, array, name)
    # Only halves of complex numbers, which are such floats, stand for their negatives. Called in this way, at half the
    # price that Cython pays for a method call in the limited API.
    if kind.is_neg is not None and tensor.dtype.code == DL_FLOAT:
        if PyObject_CallFunctionObjArgs(kind.is_neg, <void *>array, NULL):
            raise TypeError(f"{name}: this torch.Tensor stands for its negative; use resolve_neg() first")
    return view


cdef int pending() except -1:
    """Raise the exception that a C function has set, if any."""
    return -1 if PyErr_Occurred() != NULL else 0


cdef int refused(array, str name) except -1:
    """Raise for an array that its own framework would not share; why is in the exception that is set now."""
    try:
        pending()
    except MemoryError:
        raise
    except Exception as error:
        raise not_shared(array, name, error) from error
    raise not_shared(array, name, "no reason given")


cdef not_shared(array, str name, reason):
    if getattr(array, "is_deleted", bool)():  # JAX, which does not find that words itself
        reason = "it was deleted"
    first_line = str(reason).partition("\n")[0]  # PyTorch's have a C++ stack after it
    return TypeError(f"{name}: this {type_text(array)} cannot be shared: {first_line}")


cdef ArrayView read_dlpack(array, str name, stream):
    """Export and consume a capsule: it is renamed, and its deleter is the view's to call.

    ``stream`` is what the producer is to order: None for the CPU.
    """
    cdef ArrayView view = ArrayView.__new__(ArrayView)
    cdef Managed managed = Managed.__new__(Managed)
    cdef DLManagedTensorVersioned *versioned
    options = {"max_version": (1, 3)} if stream is None else {"max_version": (1, 3), "stream": stream}
    capsule = ask(array, name, "__dlpack__", options)
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        versioned = <DLManagedTensorVersioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned")
        if versioned.version.major != 1:  # what follows in the struct is unknown; the capsule still cleans up
            raise BufferError(f"{name}: DLPack {versioned.version.major}.{versioned.version.minor} is not "
                              "supported, only 1.x and older")
        PyCapsule_SetName(capsule, "used_dltensor_versioned")
        managed.versioned = versioned
        # Nobody would see what is written into a copy.
        view.readonly = versioned.flags & (DL_FLAG_READ_ONLY | DL_FLAG_IS_COPIED)
        view.owner = managed
        set_tensor(view, &versioned.dl_tensor, array, name)
    elif PyCapsule_IsValid(capsule, "dltensor"):
        managed.unversioned = <DLManagedTensor *>PyCapsule_GetPointer(capsule, "dltensor")
        PyCapsule_SetName(capsule, "used_dltensor")
        view.owner = managed
        set_tensor(view, &managed.unversioned.dl_tensor, array, name)
    else:
        raise TypeError(f"{name}: __dlpack__ of {type_text(array)} gave no fresh DLPack capsule, but "
                        f"{capsule!r}")
    return view


cdef ask(array, str name, str method, dict options):
    """Call one of an array's protocol methods; its refusal becomes a TypeError that names the argument."""
    try:
        try:
            return getattr(array, method)(**options)
        except TypeError:
            if options.pop("max_version", None) is None:
                raise
            return getattr(array, method)(**options)  # the signature from before DLPack 1.0
    except (BufferError, TypeError, ValueError, NotImplementedError) as error:
        raise not_shared(array, name, error) from error
    except Exception as error:
        error.add_note(f"raised by {method} of fa3's argument {name}")
        raise


cdef ArrayView read_parts(parts, array, str name):
    """A view of what `fa3._describe` found: data, shape, strides or None, dtype, itemsize, readonly.

    To set its device and check its memory is left to the caller.
    """
    cdef ArrayView view = ArrayView.__new__(ArrayView)
    cdef int i
    data, shape, strides, dtype, itemsize, readonly = parts
    view.owner = array
    view.data = data
    set_ndim(view, len(shape), name)
    for i in range(view.ndim):
        view.c_shape[i] = shape[i]
        if strides is not None:
            view.c_strides[i] = strides[i]
    if strides is None:
        set_contiguous(view)
    view.dtype = sys.intern(dtype)
    view.itemsize = itemsize
    view.readonly = readonly
    return view
