"""Where ``fa3 run`` keeps its arrays and takes its time: NumPy on the CPU, PyTorch or CuPy on a GPU."""

from __future__ import annotations

import importlib.util
import statistics
import time

import numpy as np

_CPU_SECONDS, _CPU_RUNS = 1.0, 20
_GPU_WARMUP_MS, _GPU_MS, _GPU_RUNS = 25.0, 100.0, (10, 1000)
# More than twice the L2 of any Hopper GPU. Clearing it also keeps the GPU busy while the host enqueues the call, so
# that the events around the call see the device's part alone.
_CLEAR_BYTES = 128 << 20
_CUPY_STORAGE = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8}


class NumpyDevice:
    """Arrays as they are, timed with the host's clock."""

    name = "CPU, NumPy"

    def named_dtype(self, dtype):
        return None

    def put(self, array):
        return array

    def get(self, array):
        return array

    def median_seconds(self, call):
        """Median time of one call, over about a second of them."""
        times = []
        end = time.perf_counter() + _CPU_SECONDS
        while not times or (time.perf_counter() < end and len(times) < _CPU_RUNS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times), len(times)


class _GpuDevice:
    """CUDA events around each call, the L2 cache cleared before it."""

    def median_seconds(self, call):
        for _ in range(3):
            call()
        first = self._time(call)
        for _ in range(min(_GPU_RUNS[1], int(_GPU_WARMUP_MS / first))):
            call()
        runs = min(max(_GPU_RUNS[0], int(_GPU_MS / first)), _GPU_RUNS[1])
        return statistics.median(self._time(call) for _ in range(runs)) / 1e3, runs


class TorchDevice(_GpuDevice):
    """PyTorch tensors on its current CUDA device."""

    def __init__(self, torch):
        self._torch = torch
        self.name = f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
        self._cache = torch.empty(_CLEAR_BYTES, dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def named_dtype(self, dtype):
        return None

    def put(self, array):
        torch = self._torch
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
        if array.dtype.name == "float8_e4m3fn":
            return torch.from_numpy(array.view(np.uint8)).cuda().view(torch.float8_e4m3fn)
        return torch.from_numpy(array).cuda()

    def get(self, array):
        if array.dtype == self._torch.bfloat16:
            import ml_dtypes

            return array.view(self._torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        return array.cpu().numpy()

    def _time(self, call):
        self._cache.zero_()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


class CupyDevice(_GpuDevice):
    """CuPy arrays, whose 16- and 8-bit integers carry what CuPy has no type for."""

    def __init__(self, cupy):
        self._cupy = cupy
        model = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        self.name = f"{model}, CuPy {cupy.__version__}"
        self._cache = cupy.empty(_CLEAR_BYTES, dtype=cupy.uint8)
        self._start, self._end = cupy.cuda.Event(), cupy.cuda.Event()

    def named_dtype(self, dtype):
        return dtype.name if dtype.name in _CUPY_STORAGE else None

    def put(self, array):
        return self._cupy.asarray(array.view(_CUPY_STORAGE.get(array.dtype.name, array.dtype)))

    def get(self, array):
        array = self._cupy.asnumpy(array)
        if array.dtype == np.uint16:
            import ml_dtypes

            return array.view(ml_dtypes.bfloat16)
        return array

    def _time(self, call):
        self._cache.fill(0)
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._cupy.cuda.get_elapsed_time(self._start, self._end)


def choose_device(wanted: str):
    """The device for ``--device auto | cpu | gpu``.

    `auto` takes a GPU that fa3's kernels run on, if there is one and CuPy or PyTorch can fill it; `gpu` takes whatever
    GPU there is, and leaves it to the library to refuse.
    """
    if wanted == "cpu" or (wanted == "auto" and not has_hopper()):
        return NumpyDevice()
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return TorchDevice(torch)
    if importlib.util.find_spec("cupy") is not None:
        import cupy

        if cupy.is_available():
            return CupyDevice(cupy)
    if wanted == "gpu":
        raise RuntimeError("--device gpu: needs a CUDA device, and CuPy or PyTorch with CUDA to make arrays on it")
    return NumpyDevice()


def has_hopper() -> bool:
    """Whether some device here is of compute capability 9.0, which fa3's kernels are made for."""
    from . import _core

    return any(tuple(_core.device_info(i)["compute_capability"]) == (9, 0) for i in range(_core.device_count()))
