"""Hypothesis profiles, and the backends that this machine can test.

`pytest` runs the quick profile; `pytest --hypothesis-profile=long` draws many more examples. Tests marked `gpu`
run by themselves where a GPU of compute capability 9.0 is present, and report why not where there is none. With
FA3_REQUIRE_GPU=1 in the environment they then fail: on a machine that has one, all skipped must not pass for all well.
"""

import functools
import os
import sys
import types
from pathlib import Path

import emulated
import pytest
from hypothesis import HealthCheck, settings

# `python -m pytest` puts the checkout first on the path, where fa3/ has no compiled modules: an installed fa3 goes
# before it.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent.parent:
    sys.path.append(sys.path.pop(0))

if emulated.LIBRARY:
    emulated.load()  # before anything imports fa3

# Examples take up to 0.1 s, and sometimes longer when something else runs: no deadline.
settings.register_profile("quick", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "long", max_examples=1500, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(  # for compute-sanitizer, which slows kernels down a hundredfold
    "few", max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quick")  # --hypothesis-profile is read later, and wins


@functools.cache
def missing_gpu():
    """Why the GPU tests cannot run here, or None."""
    from fa3 import _core

    devices = [_core.device_info(i) for i in range(_core.device_count())]
    if not devices:
        return "no CUDA device"
    if tuple(devices[0]["compute_capability"]) != (9, 0):
        major, minor = devices[0]["compute_capability"]
        return f"device 0 ({devices[0]['name']}) has compute capability {major}.{minor}, not 9.0"
    return None


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU of compute capability 9.0; skipped where there is none")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and missing_gpu():
        stop = pytest.fail if os.environ.get("FA3_REQUIRE_GPU") == "1" else pytest.skip
        stop(f"needs a GPU of compute capability 9.0: {missing_gpu()}")


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request):
    """Where a test's arrays live: "cpu", and "gpu" where there is one."""
    return request.param


@pytest.fixture(scope="session")
def torch():
    """PyTorch, which makes the arrays of tests of the GPU alone."""
    return emulated.Torch() if emulated.LIBRARY else pytest.importorskip("torch")


@pytest.fixture(params=["tiles as they are", "small tiles"], scope="module")
def tiles(request):
    """The CPU backend's tiles; small ones bring several tiles of queries and keys into small problems."""
    from fa3 import _numpy

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "small tiles":
            patch.setattr(_numpy, "TILE_ROWS", 24)
            patch.setattr(_numpy, "TILE_SCORES", 24 * 20)
            patch.setattr(_numpy, "MIN_TILE_KEYS", 16)
        yield


@pytest.fixture
def waits(monkeypatch):
    """What stream was made to wait for what, in place of CUDA: (waiting, signalling, device)."""
    from fa3 import _array

    calls = []
    monkeypatch.setattr(_array, "stream_wait", lambda *call: calls.append(call))
    return calls


@pytest.fixture
def owner(monkeypatch):
    """The device that owns every pointer, in place of CUDA."""
    from fa3 import _view

    answer = types.SimpleNamespace(device=0)
    monkeypatch.setattr(_view, "pointer_device", lambda address: answer.device)
    return answer
