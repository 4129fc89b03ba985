"""How each framework makes an array for a result, and how the result goes back to the caller.

The fast way, DLPack's exchange API, is in ``_array.pyx``; here is everybody else.
"""

import contextlib
import queue
import sys
import threading

import numpy

from fa3 import _stream
from fa3._dtypes import STORAGE, numpy_dtype

_CPU = 1


def empty(border, shape, dtype, like):
    """An array for a result, of ``border``'s framework where that can be.

    Returns
    -------
    array : array
        What is to be written.
    finish : callable or None
        Makes what the caller receives of ``array`` once the work that writes it has been enqueued.
    """
    make = _MAKERS.get(border.framework)
    if make is not None:
        return make(border, shape, dtype, like)
    array, finish = (_numpy if border.device_type == _CPU else _foreign)(border, shape, dtype, like)
    namespace = getattr(like, "__array_namespace__", None)
    if namespace is None or not hasattr(namespace(), "from_dlpack"):
        return array, finish
    return array, lambda array: _home(namespace(), array if finish is None else finish(array))


def _home(namespace, array):
    """``array`` in the caller's framework, by DLPack; as it is when that cannot take its dtype."""
    try:
        return namespace.from_dlpack(array)
    except (BufferError, TypeError):
        return array


def _numpy(border, shape, dtype, like):
    return numpy.empty(shape, numpy_dtype(STORAGE.get(dtype, dtype) if border.retyped else dtype)), None


def _torch(border, shape, dtype, like):
    """In the memory pool of our stream, as if the caller had entered that stream."""
    torch = sys.modules["torch"]
    dtype = getattr(torch, dtype)
    if border.device_type == _CPU:
        return torch.empty(shape, dtype=dtype, device="cpu"), None
    with torch.cuda.stream(torch_stream(border.stream, border.device_id)):
        return torch.empty(shape, dtype=dtype, device=f"cuda:{border.device_id}"), None


def torch_stream(handle, device):
    """PyTorch's object for a stream handle; its ExternalStream(0) would be a new stream, not the default one."""
    cuda = sys.modules["torch"].cuda
    return cuda.ExternalStream(handle, device=device) if handle else cuda.default_stream(device)


def _cupy(border, shape, dtype, like):
    import cupy

    if dtype in STORAGE:  # CuPy knows these only where it was handed one
        known = border.framework == "cupy" and not border.retyped and like.dtype.name in STORAGE
        dtype = numpy_dtype(dtype) if known else STORAGE[dtype]
    with cupy.cuda.Device(border.device_id):
        if _stream.current("cupy", border.device_id) == border.stream:
            return cupy.empty(shape, dtype), None
        with _cupy_stream(cupy, border.stream, border.device_id):
            return cupy.empty(shape, dtype), None


class _Handle:
    """A handle that speaks the stream protocol."""

    def __init__(self, handle):
        self._handle = handle

    def __cuda_stream__(self):
        return 0, self._handle


def _cupy_stream(cupy, handle, device):
    if handle == 0:
        return cupy.cuda.Stream.null
    if handle == 2:
        return cupy.cuda.Stream.ptds
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14
        return cupy.cuda.Stream.from_external(_Handle(handle))
    return cupy.cuda.ExternalStream(handle, device)


def _foreign(border, shape, dtype, like):
    """A CuPy array for a caller who has arrays of the CUDA Array Interface only."""
    try:
        import cupy  # noqa: F401
    except ImportError:
        kind = type(like).__name__
        raise TypeError(f"{border.name}: results for {kind} come back as CuPy arrays, and CuPy is not installed; "
                        "pass out= to write into an array of your own") from None
    array, _ = _cupy(border, shape, dtype, like)

    def finish(array):
        if not border.stream_given:  # the caller goes on in CuPy's stream, which knows nothing of ours
            border.lead(_stream.current("cupy", border.device_id))
        return array

    return array, finish


def _jax(border, shape, dtype, like):
    """JAX hands out no memory to write, so a fresh array's is written before anybody else can see it."""
    import jax

    device = next(iter(like.devices()))
    if border.device_type == _CPU:

        def to_jax(array):
            with jax.default_device(device):
                return jax.numpy.asarray(array)

        return numpy.empty(shape, numpy_dtype(dtype)), to_jax

    with jax.default_device(device):
        array = jax.numpy.empty(shape, numpy_dtype(dtype))

    def finish(array):
        result = jax.dlpack.from_dlpack(_Written(array, border))
        _keeper.keep(result, border.held)
        return result

    return array, finish


class _Written:
    """An array of JAX that a stream of ours is writing: its reader is made to wait for that stream."""

    def __init__(self, array, border):
        self._array, self._border = array, border

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **options):
        self._border.lead(_stream.same_name(stream or 0))
        return self._array.__dlpack__(stream=stream, **options)


class _Keeper:
    """Keeps what a call read and wrote alive until the call's result is ready.

    JAX gives a buffer's memory to its next array as soon as the last owner goes, ordered only behind JAX's
    own work; it cannot know of a kernel on another stream that still reads it. A thread waits for each result,
    so that no caller does.
    """

    def __init__(self):
        self._calls = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread = None

    def keep(self, result, held):
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fa3-jax-keeper", daemon=True)
                self._thread.start()
        self._calls.put((result, held))

    def _run(self):
        while True:
            result, held = self._calls.get()
            with contextlib.suppress(Exception):  # the GPU's, or of a deleted result: JAX tells its owner
                result.block_until_ready()
            del result, held


_keeper = _Keeper()
_MAKERS = {"numpy": _numpy, "torch": _torch, "cupy": _cupy, "jax": _jax}
