"""`import fa3` is light: no framework but NumPy, no GPU, no driver, a fifth of a second."""

import os
import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "jax", "jaxlib", "cupy", "numba", "ml_dtypes", "tensorflow")


def python(code, **environment):
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_framework_is_loaded():
    code = f"import sys, fa3; print([name for name in {FRAMEWORKS} if name in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("module", ["fa3", "fa3._array", "fa3._core"])
def test_no_driver_is_opened(module):
    """CUDA's driver is opened by the first call that needs a GPU, not by the import."""
    code = f"import {module}; print([line for line in open('/proc/self/maps') if 'libcuda.so' in line])"
    assert python(code) == "[]"


def test_works_without_a_gpu():
    code = ("import fa3, numpy; x = numpy.ones((1, 3, 2, 8), 'float16');"
            "print(fa3.flash_attn_func(x, x, x).shape)")
    assert python(code, CUDA_VISIBLE_DEVICES="") == "(1, 3, 2, 8)"


def test_time():
    """What fa3 adds to NumPy, whose own import is as fast as the machine's disk."""
    code = "import time, numpy; t = time.perf_counter(); import fa3; print(time.perf_counter() - t)"
    best = min(float(python(code)) for _ in range(5))
    assert best < 0.1, f"import fa3 took {best:.3f} s after NumPy's"


def test_the_cpu_backend_loads_when_it_is_called():
    code = ("import sys, fa3, numpy; before = 'ml_dtypes' in sys.modules;"
            "x = numpy.ones((1, 3, 2, 8), 'float32'); fa3.flash_attn_func(x, x, x);"
            f"print(before, [name for name in {FRAMEWORKS[:5]} if name in sys.modules])")
    assert python(code) == "False []"
