"""Where the host's time goes in one call: ``python -m bench.host_profile [torch|cupy|jax]``.

Prints µs per call of small dense attention, whole and by stage. Where there is no GPU, PyTorch's arrays are those of
`bench.stand_in`: the host does all it would do, and CUDA's part (launch, PyTorch's allocator for the GPU) is missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

from . import stand_in, timing

SHAPE = (2, 64, 4, 128)  # so small that the GPU is always faster than the host


class HostClock:
    """As much of a clock as `timing.measure_host` asks for."""

    def __init__(self, synchronize):
        self.synchronize = synchronize

    def host_seconds(self):
        return time.perf_counter()


class Torch:
    """PyTorch's arrays, in bfloat16."""

    writable = True

    def __init__(self):
        import torch

        self._torch = torch
        if torch.cuda.is_available():
            device, self._device, self.synchronize = torch.cuda.get_device_name(), "cuda", torch.cuda.synchronize
            self._wrap = lambda tensor: tensor
        else:
            device, self._device, self.synchronize = "stand-in for a GPU", "cpu", lambda: None
            self._wrap = _stand_in().tensor
        self.name = f"PyTorch {torch.__version__}, {device}"

    def zeros(self, shape):
        return self._wrap(self._torch.zeros(shape, dtype=self._torch.bfloat16, device=self._device))

    def empty(self):
        return self._torch.empty(SHAPE, dtype=self._torch.bfloat16, device=self._device)

    def attention(self, q, k, v):
        """PyTorch's own, on its own layout; None where it would compute on the CPU."""
        if self._device == "cpu":
            return None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: self._torch.nn.functional.scaled_dot_product_attention(q, k, v)


class Cupy:
    """CuPy's arrays, in float16."""

    writable = True

    def __init__(self):
        import cupy

        self._cupy = cupy
        self.name = f"CuPy {cupy.__version__}, " + cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        self.synchronize = cupy.cuda.runtime.deviceSynchronize

    def zeros(self, shape):
        return self._cupy.zeros(shape, "float16")

    def empty(self):
        return self._cupy.empty(SHAPE, "float16")

    def attention(self, q, k, v):
        return None


class Jax:
    """JAX's arrays, in bfloat16."""

    writable = False

    def __init__(self):
        import jax

        self._numpy = jax.numpy
        device = jax.devices("cuda")[0]
        self.name = f"JAX {jax.__version__}, {device.device_kind}"
        self.synchronize = lambda: self._numpy.zeros(1).block_until_ready()

    def zeros(self, shape):
        return self._numpy.zeros(shape, "bfloat16")

    def empty(self):
        return self._numpy.empty(SHAPE, "bfloat16")

    def attention(self, q, k, v):
        return None


FRAMEWORKS = {"torch": Torch, "cupy": Cupy, "jax": Jax}


def profile(framework) -> list[tuple[str, float]]:
    """Rows of (what, µs): the calls, their stages, and what others take.

    A call on no rows does all but the call into libfa3, which is the difference.
    """
    import fa3
    from fa3 import _array

    q, k, v = (framework.zeros(SHAPE) for _ in "qkv")
    no_rows = framework.zeros((SHAPE[0], 0, *SHAPE[2:]))
    border = _array.Border(q, "q")
    dtype = border.view.dtype

    def views():
        border = _array.Border(q, "q")
        border.take(k, "k")
        border.take(v, "v")

    calls = {
        "call": lambda: fa3.flash_attn_func(q, k, v),
        "call, return_lse": lambda: fa3.flash_attn_func(q, k, v, return_lse=True),
        "views of q, k, v": views,
        "result array": lambda: border.empty(SHAPE, dtype).array(),
        "the framework's empty()": framework.empty,
    }
    if framework.writable:
        out, no_out = framework.zeros(SHAPE), framework.zeros(no_rows.shape)
        calls["call, out="] = lambda: fa3.flash_attn_func(q, k, v, out=out)
        calls["call, out=, no rows"] = lambda: fa3.flash_attn_func(no_rows, k, v, out=no_out)
    if (attention := framework.attention(q, k, v)) is not None:
        calls["the framework's attention"] = attention
    candidates = [timing.Candidate(name, call) for name, call in calls.items()]
    us = timing.measure_host(candidates, HostClock(framework.synchronize), rounds=50)
    if framework.writable:
        us["libfa3 and launch"] = us["call, out="] - us["call, out=, no rows"]
        us["checks, defaults, out's view"] = us["call, out=, no rows"] - us["views of q, k, v"]
    order = ("call", "call, return_lse", "call, out=", "views of q, k, v", "checks, defaults, out's view",
             "libfa3 and launch", "result array", "the framework's empty()", "the framework's attention")
    return [(name, us[name]) for name in order if name in us]


def _stand_in():
    with tempfile.TemporaryDirectory() as folder:
        return stand_in.StandIn(stand_in.build(folder))


def main(argv=None) -> int:
    """Print the table: 0, or 2 when it could not be made."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_profile", description=__doc__.partition("\n")[0])
    parser.add_argument("framework", nargs="?", choices=FRAMEWORKS, default="torch")
    try:
        framework = FRAMEWORKS[parser.parse_args(argv).framework]()
        rows = profile(framework)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"bench.host_profile: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{framework.name}, {' x '.join(map(str, SHAPE))}, µs of the host's time per call")
    for name, us in rows:
        print(f"{name:30}{us:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
