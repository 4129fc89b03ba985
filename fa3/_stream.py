"""CUDA streams by their handle, whoever made them. 0 is the legacy default stream, 2 the per-thread one."""

import sys
from operator import index

# CUDA's second name for the legacy default stream; DLPack and __cuda_array_interface__ know only this one.
_LEGACY = 1


def same_name(handle):
    """The handle under the one name that fa3 compares streams by: the legacy default stream is 0."""
    return 0 if handle == _LEGACY else handle


def for_protocol(handle):
    """The handle as DLPack's and ``__cuda_array_interface__``'s ``stream`` want it: never 0."""
    return handle or _LEGACY


def handle_of(stream):
    """The handle of ``stream=``.

    Parameters
    ----------
    stream : int or object
        A ``cudaStream_t`` as an int, an object with ``__cuda_stream__``, or a PyTorch, CuPy or Numba stream.

    Returns
    -------
    int
    """
    if isinstance(stream, bool):
        raise TypeError("stream: expected an int or a CUDA stream object, got bool")
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        _version, handle = protocol() if callable(protocol) else protocol
    else:
        handle = stream
        for attribute in ("cuda_stream", "ptr", "handle"):  # PyTorch, CuPy, Numba
            if hasattr(stream, attribute):
                handle = getattr(stream, attribute)
                handle = getattr(handle, "value", handle) or 0  # Numba's: a ctypes pointer, None by default
                break
    try:
        handle = index(handle)
    except TypeError:
        kind = type(stream).__name__
        raise TypeError(f"stream: expected an int or a CUDA stream object, got {kind}") from None
    if handle < 0:
        raise ValueError(f"stream: expected a CUDA stream handle, got {handle}")
    return same_name(handle)


def device_of(stream):
    """The device that a PyTorch or CuPy stream was made on; None where the object does not say."""
    device = getattr(stream, "device_index", getattr(stream, "device_id", None))
    return device if isinstance(device, int) and device >= 0 else None


def current(framework, device):
    """The handle of the stream on which a framework enqueues its work now.

    JAX has no stream that its user could name, and others do not say: there it is the legacy default stream,
    and the protocols order it behind the arrays' producers.
    """
    if framework == "torch":
        return same_name(sys.modules["torch"].cuda.current_stream(device).cuda_stream)
    if framework == "cupy":
        return same_name(sys.modules["cupy"].cuda.get_current_stream(device).ptr)
    if framework == "numba" and getattr(sys.modules["numba"].config, "CUDA_PER_THREAD_DEFAULT_STREAM", 0):
        return 2
    return 0
