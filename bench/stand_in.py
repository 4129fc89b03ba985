"""A stand-in for the GPU where there is none: the host's part of a call runs, the rest remembers what it was asked.

PyTorch's CPU tensors say that they are on cuda:0, by ``exchange.c``, and libfa3's entry points are those of
``stand_in.c``.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_API_NAME = b"dlpack_exchange_api"  # capsules keep the pointer: it lives for ever


def build(folder) -> Path:
    """Compile the stand-in with the machine's C compiler; FileNotFoundError where there is none."""
    library = Path(folder) / "libstand_in.so"
    subprocess.run(["cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
                    f"-I{_HERE.parent / 'src'}", _HERE / "stand_in.c", _HERE / "exchange.c", "-o", library, "-ldl"],
                   check=True)
    return library


class State(ctypes.Structure):
    """What the next call gets, and what the last one brought: the first fields of ``stand_in`` in ``stand_in.c``."""

    _fields_ = [("status", ctypes.c_int32), ("workspace_bytes", ctypes.c_size_t), ("current_stream", ctypes.c_void_p),
                ("calls", ctypes.c_size_t), ("crossings", ctypes.c_size_t), ("with_gil", ctypes.c_int32),
                ("workspace", ctypes.c_void_p), ("stream", ctypes.c_void_p)]


def load(library) -> ctypes.CDLL:
    """Load a library whose entry points come before libfa3's; RuntimeError where fa3 has been imported."""
    if "fa3" in sys.modules:
        raise RuntimeError("the stand-in for the GPU must be loaded before fa3")
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def cuda_exchange(library):
    """The exchange API of PyTorch's tensors, by which their memory is on cuda:0: see ``exchange.c``, which `library`
    has."""
    import torch

    get = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    new = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    exchange = library.exchange_on_cuda
    exchange.restype, exchange.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return new(exchange(get(torch.Tensor.__dlpack_c_exchange_api__, _API_NAME)), _API_NAME, None)


class StandIn:
    """The stand-in, loaded in front of libfa3.

    Parameters
    ----------
    library : path
        What `build` made.

    Raises
    ------
    RuntimeError
        fa3 was imported before, and has found the real library.
    """

    def __init__(self, library):
        self._library = load(library)
        self._library.stand_in_describe.restype = ctypes.c_char_p
        self.state = State.in_dll(self._library, "stand_in")
        import torch

        class CudaTensor(torch.Tensor):
            """A CPU tensor that says it is on cuda:0."""

            __dlpack_c_exchange_api__ = cuda_exchange(self._library)
            __torch_function__ = torch._C._disabled_torch_function_impl  # which would make every method slow

        self._type = CudaTensor

    def tensor(self, tensor):
        """The same memory as `tensor`'s, on cuda:0 by its own account."""
        return tensor.as_subclass(self._type)

    def params(self) -> dict[str, list[float]]:
        """The last call's ``fa3_forward_params`` by field: the number, the address, or address and strides."""
        lines = self._library.stand_in_describe().decode().splitlines()
        fields = (line.split() for line in lines)
        return {name: [_number(value) for value in values] for name, *values in fields}

    @contextlib.contextmanager
    def given(self, **state):
        """Inside, the state has these fields."""
        before = {name: getattr(self.state, name) for name in state}
        for name, value in state.items():
            setattr(self.state, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.state, name, value)


def _python(name, result, *arguments):
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


def _number(text):
    return float(text) if "." in text or ("e" in text and "x" not in text) else int(text, 0)
