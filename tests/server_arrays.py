"""What the server's day needs of an array module: NumPy's arrays, or PyTorch's on either device.

What moves rows about moves their bits: NaN compares by them, and not every framework can index fp8. `xp` is the module
itself; of it only what both spell alike is used.
"""

import contextlib

import ml_dtypes
import numpy as np
from strategies import DTYPES

INTEGERS = {1: "uint8", 2: "int16"}


def poison_of(dtype):
    """NaN's bits in a dtype of 16 or 8 bits."""
    nan = np.array([np.nan]).astype(DTYPES[dtype])
    return int(nan.view(INTEGERS[nan.itemsize])[0])


class NumpyArrays:
    """NumPy: one queue, no graphs."""

    name = "CPU, NumPy"
    xp = np
    num_streams = 1
    has_graphs = False

    def __init__(self, seed):
        self._random = np.random.default_rng([seed, 1])

    def put(self, values):
        """A list or array of integers or floats from the host."""
        return np.array(values)

    def normal(self, shape, dtype):
        return self._random.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])

    def poison(self, shape, dtype):
        """The bits of NaN everywhere."""
        integer = INTEGERS[DTYPES[dtype].itemsize]
        return np.full(shape, poison_of(dtype), integer)

    def typed(self, bits, dtype):
        return bits.view(DTYPES[dtype])

    def bits(self, array):
        return array.view(INTEGERS[array.dtype.itemsize])

    def cast(self, array, dtype):
        return array.astype(DTYPES[dtype])

    def epsilon(self, dtype):
        return float(ml_dtypes.finfo(DTYPES[dtype]).eps)

    def arange(self, count):
        return np.arange(count)

    def total(self, array):
        """The sum of integers, modulo 2^64, or of truths: a scalar of the framework."""
        return array.sum(dtype=np.int64)

    def longs(self, array):
        return array.astype(np.int64)

    def host(self, scalars):
        """A list of scalars of the framework, as numbers."""
        return [x.item() for x in scalars]

    def stream(self, index):
        """A context in which calls go to one of the streams."""
        return contextlib.nullcontext()

    def fork(self):
        """Let all streams wait for what is under way."""

    def join(self):
        """Wait on the main stream for all others."""


class TorchArrays(NumpyArrays):
    """PyTorch: on a GPU with streams of its own and graphs; on the CPU as NumPy."""

    def __init__(self, seed, device="cuda"):
        import torch

        self.xp, self._device = torch, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self.has_graphs = device == "cuda"
        self.name = f"CPU, PyTorch {torch.__version__}"
        if self.has_graphs:
            self.name = f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
            self.num_streams = 3
            self._streams = [torch.cuda.Stream() for _ in range(self.num_streams)]

    def put(self, values):
        return self.xp.from_numpy(np.array(values)).to(self._device)

    def normal(self, shape, dtype):
        values = self.xp.randn(shape, generator=self._generator, device=self._device)
        return values.to(getattr(self.xp, dtype))

    def poison(self, shape, dtype):
        integer = getattr(self.xp, INTEGERS[DTYPES[dtype].itemsize])
        return self.xp.full(shape, poison_of(dtype), dtype=integer, device=self._device)

    def typed(self, bits, dtype):
        return bits.view(getattr(self.xp, dtype))

    def bits(self, array):
        return array.view(getattr(self.xp, INTEGERS[array.element_size()]))

    def cast(self, array, dtype):
        return array.to(getattr(self.xp, dtype))

    def arange(self, count):
        return self.xp.arange(count, device=self._device)

    def total(self, array):
        return array.sum(dtype=self.xp.int64)

    def longs(self, array):
        return array.to(self.xp.int64)

    def host(self, scalars):
        by_type = {}
        for place, x in enumerate(scalars):
            by_type.setdefault(x.dtype, []).append((place, x))
        numbers = [None] * len(scalars)
        for pairs in by_type.values():  # one transfer each
            values = self.xp.stack([x for _, x in pairs]).tolist()
            for (place, _), value in zip(pairs, values, strict=True):
                numbers[place] = value
        return numbers

    def stream(self, index):
        return self.xp.cuda.stream(self._streams[index]) if self.has_graphs else contextlib.nullcontext()

    def fork(self):
        if self.has_graphs:
            for stream in self._streams:
                stream.wait_stream(self.xp.cuda.current_stream())

    def join(self):
        if self.has_graphs:
            for stream in self._streams:
                self.xp.cuda.current_stream().wait_stream(stream)

    def capture(self, call):
        """The call as a graph: a function that replays it. It runs once before, for CUDA to load its kernels."""
        call()
        graph = self.xp.cuda.CUDAGraph()
        with self.xp.cuda.graph(graph):
            call()
        return graph.replay
