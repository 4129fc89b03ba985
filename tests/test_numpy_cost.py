"""What the CPU backend costs: memory that grows with the lengths alone, and its speed beside NumPy's naive formula."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from strategies import Problem, make

from fa3 import _numpy, _numpy_backward

SPEED = """
import time
import numpy as np
from fa3 import _numpy

q, k, v = (np.random.default_rng(0).standard_normal((4, 2048, 64), dtype=np.float32) for _ in range(3))
dense = [x.swapaxes(0, 1)[None] for x in (q, k, v)]
out = np.empty((1, 2048, 4, 64), np.float32)

def naive():
    s = q @ k.swapaxes(1, 2) * 0.125
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) @ v

def blocked():
    _numpy.forward(*dense, out, None, batch=1, max_seqlen_q=2048, max_seqlen_k=2048, softmax_scale=0.125, causal=False,
                   window_left=-1, window_right=-1, attention_chunk=0, softcap=0.0, num_splits=0,
                   batch_invariant=False, pack_gqa=None, sm_margin=0)

def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start

blocked()
assert np.abs(out[0].swapaxes(0, 1) - naive()).max() < 1e-5
print(min(seconds(naive) for _ in range(5)) / min(seconds(blocked) for _ in range(5)))
"""


def test_half_of_the_speed_of_the_naive_formula_and_more():
    """On one thread, by CPU time: what else runs here does not count."""
    one_thread = dict.fromkeys(["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"], "1")
    done = subprocess.run([sys.executable, "-P", "-c", SPEED], env=os.environ | one_thread, capture_output=True,
                          text=True, check=True)
    ratio = float(done.stdout)
    print(f"{ratio:.2f} of the naive formula's speed")
    assert ratio >= 0.5


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_memory_does_not_grow_with_the_square_of_the_length(backward, dropout_p):
    def peak(seqlen):
        problem = Problem(seqlens_q=(seqlen,), seqlens_k=(seqlen,), num_heads_kv=2, dtype="float32", causal=True)
        arrays = make(problem)
        inputs, gradients = (arrays.q, arrays.k, arrays.v), [np.empty_like(x) for x in (arrays.q, arrays.k, arrays.v)]
        keywords = dict(
            batch=1, max_seqlen_q=seqlen, max_seqlen_k=seqlen, softmax_scale=0.125, causal=True, window_left=-1,
            window_right=-1, attention_chunk=0, softcap=0.0, dropout_p=dropout_p, dropout_seed=1)
        arrays.out[...], arrays.lse[...] = 0, 0  # what they hold costs the same
        tracemalloc.start()
        if backward:
            _numpy_backward.backward(arrays.out, *inputs, arrays.out, arrays.lse, *gradients, None, **keywords)
        else:
            _numpy.forward(*inputs, arrays.out, arrays.lse, num_splits=0, batch_invariant=False, pack_gqa=None,
                           sm_margin=0, **keywords)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, arrays.q.nbytes

    short, _ = peak(1024)
    long, inputs = peak(4096)
    assert long < short + 3 * inputs
    assert long < 4096 * 4096 * 4 / 4  # a quarter of one head's scores
