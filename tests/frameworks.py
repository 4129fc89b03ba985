"""NumPy arrays handed to other frameworks and devices, odd strides and the bytes around them included."""

import importlib.util
import os

import emulated
import ml_dtypes
import numpy as np
import pytest

CPU_DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float32", "float64")
GPU_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")  # those of which the GPU's kernels are built

CUPY_STORAGE = {"bfloat16": np.dtype(np.uint16), "float8_e4m3fn": np.dtype(np.uint8)}


class Numpy:
    """NumPy itself: arrays pass as they are."""

    dtypes = CPU_DTYPES
    on_gpu = False
    strided = writable = True

    def options(self, array):
        """What a call must say besides its arrays: `dtype` where the framework cannot."""
        return {}

    def flat(self, buffer):
        """A one-dimensional array of the framework with the buffer's elements."""
        return buffer.reshape(-1)

    def view(self, flat, shape, strides, offset):
        """A view into `flat`; strides and offset count elements."""
        itemsize = flat.dtype.itemsize
        return np.ndarray(shape, flat.dtype, flat, offset * itemsize, [stride * itemsize for stride in strides])

    def numpy(self, array, dtype=None):
        """The framework's array as NumPy's; `dtype` names the type where the framework cannot."""
        assert isinstance(array, np.ndarray)
        return array

    def put(self, view, buffer=None):
        """(array, flat): a NumPy array at its place in its buffer (default: a compact copy)."""
        if buffer is None or not self.strided:
            buffer = view = np.array(view, order="C")
        flat = self.flat(buffer)
        itemsize = view.itemsize
        offset = (view.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]) // itemsize
        strides = [stride // itemsize for stride in view.strides]
        return self.view(flat, view.shape, strides, offset if view.size else 0), flat


class Torch(Numpy):
    """PyTorch, on the CPU."""

    device = "cpu"

    def _storage(self):
        import torch

        return {"bfloat16": (np.uint16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}

    def flat(self, buffer):
        import torch

        flat = np.array(buffer).reshape(-1)  # a copy: the test's own buffer stays as it was
        storage, dtype = self._storage().get(flat.dtype.name, (flat.dtype, None))
        tensor = torch.from_numpy(flat.view(storage)).to(self.device)
        return tensor if dtype is None else tensor.view(dtype)

    def view(self, flat, shape, strides, offset):
        return flat.as_strided(tuple(shape), tuple(strides), offset)

    def numpy(self, array, dtype=None):
        import torch

        assert isinstance(array, torch.Tensor) and array.device.type == self.device
        array = array.detach()
        for name, (storage, torch_dtype) in self._storage().items():
            if array.dtype == torch_dtype:
                array = array.contiguous().view(getattr(torch, np.dtype(storage).name)).cpu().numpy()
                return array.view(getattr(ml_dtypes, name))
        return array.cpu().numpy()


class TorchCuda(Torch):
    """PyTorch, on the GPU."""

    device = "cpu" if emulated.LIBRARY else "cuda"  # the emulated GPU's memory is the CPU's
    dtypes = GPU_DTYPES
    on_gpu = True


class Jax(Numpy):
    """JAX, on the CPU: arrays of no strides of their own, and never written to."""

    dtypes = ("float16", "bfloat16", "float32")  # it makes float64 only when told to for the whole process
    platform = "cpu"
    strided = writable = False

    def flat(self, buffer):
        return buffer

    def view(self, flat, shape, strides, offset):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of a GPU's memory
        import jax

        return jax.device_put(flat, jax.devices(self.platform)[0])

    def numpy(self, array, dtype=None):
        import jax

        assert isinstance(array, jax.Array) and next(iter(array.devices())).platform in (self.platform, "gpu")
        return np.asarray(array)


class JaxCuda(Jax):
    """JAX, on the GPU."""

    dtypes = GPU_DTYPES
    platform = "cuda"
    on_gpu = True


class CuPy(Numpy):
    """CuPy, which has no bfloat16 and no fp8: their bytes travel as uint16 and uint8, and `dtype` tells."""


    dtypes = GPU_DTYPES
    on_gpu = True

    def options(self, array):
        names = [name for name, storage in CUPY_STORAGE.items() if array.dtype == storage]
        return {"dtype": names[0]} if names else {}

    def flat(self, buffer):
        import cupy

        flat = buffer.reshape(-1)
        return cupy.asarray(flat.view(CUPY_STORAGE.get(flat.dtype.name, flat.dtype)))

    def view(self, flat, shape, strides, offset):
        import cupy

        itemsize = flat.dtype.itemsize
        return cupy.ndarray(tuple(shape), flat.dtype, flat.data + offset * itemsize,
                            [stride * itemsize for stride in strides])

    def numpy(self, array, dtype=None):
        import cupy

        assert isinstance(array, cupy.ndarray)
        array = array.get()
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def _parameter(name, framework, module):
    missing = importlib.util.find_spec(module) is None
    marks = [pytest.mark.skipif(missing, reason=f"{module} is not installed")]
    return pytest.param(framework, id=name, marks=marks + [pytest.mark.gpu] * framework.on_gpu)


CPU = [_parameter("numpy", Numpy(), "numpy"), _parameter("torch", Torch(), "torch"), _parameter("jax", Jax(), "jax")]
GPU = [_parameter("torch-cuda", TorchCuda(), "torch"), _parameter("cupy", CuPy(), "cupy"),
       _parameter("jax-cuda", JaxCuda(), "jax")]
CUPY = GPU[1]  # whose strides may be negative
if emulated.LIBRARY:
    GPU = [_parameter("torch-emulated", TorchCuda(), "torch")]
ALL = CPU + GPU
WRITABLE = [parameter for parameter in ALL if parameter.values[0].writable]
# One framework for each backend, for what does not depend on the framework.
BACKENDS = [CPU[0], GPU[0]]
