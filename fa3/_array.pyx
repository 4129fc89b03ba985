# cython: language_level=3, boundscheck=False, wraparound=False
"""The border that a call's arrays cross: any framework's array in, results back as that framework's arrays.

A `Border` belongs to one call. It is made from the call's first array, which settles framework, device and
stream; it then looks at the other arrays (`take`), makes arrays for results (`empty`) and admits the caller's
own (`wrap`). Every array of a CUDA device is ordered: our stream waits for the one that its producer uses.
What an array is, `fa3._view` finds out; how frameworks differ when they give is in `fa3._frameworks`.
"""
cimport cython
from cpython.exc cimport PyErr_SetString
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t, uintptr_t

from fa3 cimport _fa3
from fa3._dlpack cimport DL_CPU, DL_CUDA, DL_CUDA_MANAGED, DLManagedTensorVersioned, DLTensor
from fa3._view cimport (ATTRIBUTES, DLPACK, EXCHANGE, NDARRAY, ArrayView, Kind, ask, check_memory,
                        check_written, device_text, kind_of, pending, read_dlpack, read_exchange,
                        read_ndarray, read_parts, refused, set_device, set_tensor, type_text)

from fa3 import _describe, _dtypes, _frameworks, _stream
from fa3 import _view as _views
from fa3._errors import raise_status

cdef enum:
    MAX_NDIM = 8

cdef dict CODE_OF = _dtypes.CODE_OF


def stream_wait(uintptr_t waiting, uintptr_t signalling, int device):
    """Order a stream behind all that is enqueued on another one so far; the host does not wait."""
    cdef int status = _fa3.fa3_stream_wait(<void *>waiting, <void *>signalling, device)
    if status != 0:
        raise_status(status, _fa3.fa3_status_string(status).decode(), _fa3.fa3_last_error().decode(),
                     _fa3.fa3_last_cuda_error())


@cython.final
cdef class Output:
    """An array for a result: `view` is to be written, `array()` is for the caller once that is enqueued."""

    cpdef object array(self):
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._array = finish(self._array)
        return self._array


@cython.final
cdef class Border:
    """The arrays of one call.

    Their memory is read as it is: a tensor that requires gradients is read without them, and results do not
    require any. With `stream`, arrays must live until the work on it is done, as with any work on another
    stream than the framework's; only PyTorch and JAX are told of it.

    Parameters
    ----------
    array : array
        The call's first array.
    name : str
        What the call's signature calls it; errors begin with it.
    stream : int or object, optional
        The stream to work on; None: the current one of the array's framework.
    dtype : str or dtype object, optional
        What the array's bytes are, where its framework cannot say.

    Attributes
    ----------
    view : ArrayView
        Of that first array.
    device_type, device_id : int
    stream : int
        A ``cudaStream_t``; 0 on the CPU.
    stream_given : bool
    framework : str
        "numpy", "torch", "cupy", "jax", "numba", or "" for others.
    retyped : bool
        ``dtype=`` told the first array's type; results then have their framework's storage types as well.
    held : list or None
        Views that must outlive the GPU's work (JAX), not only the call.
    """

    def __init__(self, array, str name, stream=None, dtype=None):
        self.begin(array, name, stream, dtype)

    cdef int begin(self, array, str name, stream, dtype) except -1:
        """What `border_of` and ``__init__`` have to do."""
        self.name = name
        self.kind = kind_of(type(array))
        self.framework = self.kind.framework
        self.like = array
        if stream is not None:
            self.asked = stream
            self.stream = _stream.handle_of(stream)
            self.stream_given = True
        self.view = self.read(array, name, True)
        if dtype is not None:
            found = self.view.dtype
            self.view.dtype = _dtypes.retyped(found, dtype, name)
            self.retyped = self.view.dtype != found
        if self.kind.jax and self.device_type == DL_CUDA:
            self.held = [self.view]
        return 0

    cpdef ArrayView take(self, array, str name, dtype=None, bint writable=False, bint same_device=True):
        """A view of a later argument.

        Parameters
        ----------
        array : array
            Of any framework.
        name : str
        dtype : str or dtype object, optional
            What the array's bytes are, where its framework cannot say.
        writable : bool
            The array will be written, too.
        same_device : bool
            Refuse an array that is not where the first one is.

        Returns
        -------
        ArrayView
        """
        cdef ArrayView view = self.read(array, name, same_device)
        if dtype is not None:
            view.dtype = _dtypes.retyped(view.dtype, dtype, name)
        if writable:
            check_written(view, array, name)
        if self.held is not None:
            self.held.append(view)
        return view

    cpdef Output wrap(self, array, str name):
        """An `Output` that is the caller's own array."""
        cdef Output output = Output.__new__(Output)
        output.view = self.take(array, name, None, True)
        if self.retyped and output.view.dtype == "uint16":  # as `empty` would have made it
            output.view.dtype = "bfloat16"
        output._array = array
        return output

    def empty(self, shape, dtype):
        """An `Output` in a new array: of the caller's framework, on its device, C-contiguous."""
        cdef int64_t[MAX_NDIM] c_shape
        cdef int ndim = 0
        if len(shape) > MAX_NDIM:
            raise ValueError(f"out: {len(shape)} dimensions, but no array has more than {MAX_NDIM}")
        for extent in shape:
            c_shape[ndim] = extent
            ndim += 1
        return self.make(ndim, c_shape, _dtypes.name_of(dtype))

    cdef Output make(self, int ndim, const int64_t *shape, str dtype):
        """`empty` with a shape in C."""
        cdef Output output = Output.__new__(Output)
        cdef int i
        if self.kind.exchange != NULL and (self.stream == self.native or not self.kind.torch):
            self.allocate(output, ndim, shape, dtype)
            if self.stream != self.native:
                # The memory's last user may still be at it.
                stream_wait(self.stream, self.native, self.device_id)
        else:
            output._array, output._finish = _frameworks.empty(
                self, tuple([shape[i] for i in range(ndim)]), dtype, self.like)
            output.view = self.read(output._array, "out", True)
            output.view.dtype = dtype
            output.view.readonly = False  # JAX's arrays are, for all but us
        if self.held is not None:
            self.held.append(output.view)
        return output

    def lead(self, uintptr_t waiting):
        """Order another stream behind what is enqueued on ours."""
        if self.device_type == DL_CUDA and waiting != self.stream:
            stream_wait(waiting, self.stream, self.device_id)

    cdef int allocate(self, Output output, int ndim, const int64_t *shape, str dtype) except -1:
        """A new array by the framework's C allocator."""
        cdef DLTensor prototype
        cdef DLManagedTensorVersioned *managed = NULL
        cdef void *made = NULL
        prototype.data = NULL
        prototype.ndim = ndim
        prototype.shape = <int64_t *>shape
        prototype.strides = NULL
        prototype.byte_offset = 0
        prototype.device.device_type = self.device_type
        prototype.device.device_id = self.device_id
        code, bits = CODE_OF[dtype]
        prototype.dtype.code = code
        prototype.dtype.bits = bits
        prototype.dtype.lanes = 1
        if self.kind.exchange.managed_tensor_allocator(&prototype, &managed, NULL, allocation_failed) != 0:
            pending()
            raise MemoryError(f"out: {type_text(self.like)}'s allocator failed")
        output.view = ArrayView.__new__(ArrayView)
        try:
            set_tensor(output.view, &managed.dl_tensor, self.like, "out")
        except BaseException:
            if managed.deleter != NULL:
                managed.deleter(managed)
            raise
        if self.kind.exchange.managed_tensor_to_py_object_no_sync(managed, &made) != 0:  # owns managed now
            pending()
            raise MemoryError(f"out: {type_text(self.like)} would not take its own allocation")
        output._array = <object>made
        Py_DECREF(output._array)
        output.view.owner = output._array
        return 0

    cdef ArrayView read(self, array, str name, bint same_device):
        """A view of any array, with our stream behind its producer."""
        cdef Kind kind = self.kind if type(array) is self.kind.kind else kind_of(type(array))
        cdef ArrayView view
        cdef void *handle = NULL
        if kind.refusal is not None:
            raise TypeError(f"{name}: a {type_text(array)} {kind.refusal}")
        if kind.route == NDARRAY:
            view = read_ndarray(array, name)
            self.place(view.device_type, view.device_id, name, same_device)
        elif kind.route == EXCHANGE:
            view = read_exchange(kind, array, name)
            if self.place(view.device_type, view.device_id, name, same_device):
                if kind is not self.current_of:  # it stays the same while the call looks at its arrays
                    if kind.exchange.current_work_stream(DL_CUDA, view.device_id, &handle) != 0:
                        refused(array, name)
                    self.current, self.current_of = <uintptr_t>handle, kind
                self.follow(self.current, kind, array)
        elif kind.route == ATTRIBUTES:
            view = self.read_torch(kind, array, name, same_device)
        elif kind.route == DLPACK:
            view = self.read_protocol(kind, array, name, same_device)
        else:
            view = self.read_interface(kind, array, name, same_device)
        if kind.jax:
            view.readonly = True
        return view

    cdef ArrayView read_torch(self, Kind kind, array, str name, bint same_device):
        """A tensor of a PyTorch without the exchange API."""
        *parts, device_type, device_id = _describe.from_torch(array, name)
        cdef ArrayView view = read_parts(parts, array, name)
        set_device(view, device_type, device_id, name)
        check_memory(view, array, name)
        if self.place(view.device_type, view.device_id, name, same_device):
            self.follow(_stream.current("torch", device_id), kind, array)
        return view

    cdef ArrayView read_protocol(self, Kind kind, array, str name, bint same_device):
        """An array that orders our stream itself, when it is told of it."""
        cdef ArrayView view
        cdef bint ordered = False
        cdef int device_type, device_id
        device = ask(array, name, "__dlpack_device__", {})
        try:
            device_type, device_id = device
        except (TypeError, ValueError):
            raise TypeError(f"{name}: __dlpack_device__ of {type_text(array)} gave {device!r}, "
                            "needs (device_type, device_id)") from None
        if device_type == DL_CUDA:
            ordered = self.place(device_type, device_id, name, same_device)
        elif device_type == DL_CUDA_MANAGED:  # where it lives shows later
            ordered = True
        if ordered and not self.opened:
            self.open(_stream.current(kind.framework, device_id))
        try:
            view = read_dlpack(array, name, _stream.for_protocol(self.stream) if ordered else None)
        except TypeError:
            if not ordered or not hasattr(array, "__cuda_array_interface__"):
                raise
            return self.read_interface(kind, array, name, same_device)  # CuPy: bfloat16, for one
        if device_type != DL_CUDA:
            self.place(view.device_type, view.device_id, name, same_device)
        return view

    cdef ArrayView read_interface(self, Kind kind, array, str name, bint same_device):
        """An array of the CUDA Array Interface, which tells the stream to wait for, and not the device."""
        cdef ArrayView view
        cdef int device_id = self.device_id if self.device_type == DL_CUDA else 0
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            raise TypeError(f"{name}: expected an array (DLPack or __cuda_array_interface__), got "
                            f"{type_text(array)}")
        *parts, stream = _describe.from_cuda_array_interface(array, interface, name)
        view = read_parts(parts, array, name)
        if view.data != 0:
            device_id = _views.pointer_device(view.data)
        if device_id < 0:
            raise BufferError(f"{name}: its __cuda_array_interface__ points to host memory")
        set_device(view, DL_CUDA, device_id, name)
        check_memory(view, array, name)
        if self.place(DL_CUDA, device_id, name, same_device):
            if stream is not None:
                self.follow(stream, kind, array)
            elif not self.opened:
                self.open(_stream.current(kind.framework, device_id))
        return view

    cdef bint place(self, int device_type, int device_id, str name, bint same_device) except -1:
        """Settle the call's device by the first array, and hold the others to it.

        True when our stream is to be ordered behind the array's producer.
        """
        if not self.placed:
            self.placed = True
            self.device_type = device_type
            self.device_id = device_id
            if device_type == DL_CPU:
                self.stream = 0
            elif self.stream_given:
                stream_device = _stream.device_of(self.asked)
                if stream_device is not None and stream_device != device_id:
                    raise BufferError(f"stream: of cuda:{stream_device}, but {name} is on cuda:{device_id}")
        elif device_type != self.device_type or device_id != self.device_id:
            if same_device:
                raise BufferError(f"{name}: on {device_text(device_type, device_id)}, but {self.name} is on "
                                  f"{device_text(self.device_type, self.device_id)}")
            return False
        return device_type == DL_CUDA

    cdef void open(self, uintptr_t current) noexcept:
        """Settle the call's stream: the one that was given, or this one."""
        if not self.stream_given:
            self.stream = current
        self.native = current
        self.followed = self.stream
        self.opened = True

    cdef int follow(self, uintptr_t producer, Kind kind, array) except -1:
        """Order our stream behind an array's producer, once for each producer."""
        if producer == 1:  # CUDA's two names of the legacy default stream
            producer = 0
        if not self.opened:
            self.open(producer)
        if producer != self.stream:
            if producer != self.followed:
                stream_wait(self.stream, producer, self.device_id)
                self.followed = producer
            if kind.torch:  # or its memory could be given to the producer's next tensor while we read
                array.record_stream(_frameworks.torch_stream(self.stream, self.device_id))
        return 0


cdef Border border_of(array, str name, stream, dtype):
    """A `Border`, at a fraction of what a call of the class costs."""
    cdef Border border = Border.__new__(Border)
    border.begin(array, name, stream, dtype)
    return border


cdef void allocation_failed(void *context, const char *kind, const char *message) noexcept with gil:
    """DLPack's way to say why: by the name of an exception and a text."""
    PyErr_SetString(MemoryError if kind[:6] == b"Memory" else RuntimeError, message)
