"""The rules that hold for the GPU's arrays only, on stand-ins for them, so that they are tested everywhere."""

import re

import ml_dtypes
import numpy as np
import pytest
from capsules import CUDA, Exporter

from fa3 import _problem

Problem = _problem.Problem
DLPACK = {"bfloat16": (4, 16, 1), "float8_e4m3fn": (10, 8, 1)}  # what NumPy cannot say


def device_array(*shape, dtype="float16", strides=None):
    """An array that says it is on a GPU; strides count elements."""
    dtype, named = np.dtype(getattr(ml_dtypes, dtype, dtype)), DLPACK.get(dtype)
    if strides is None:
        return Exporter(np.zeros(shape, dtype), device=(CUDA, 0), dtype=named)
    steps = [stride * max(size - 1, 0) for stride, size in zip(strides, shape, strict=True)]
    first = -sum(step for step in steps if step < 0)
    memory = np.zeros(1 + sum(map(abs, steps)), dtype)
    array = np.ndarray(shape, dtype, memory, first * dtype.itemsize, [stride * dtype.itemsize for stride in strides])
    return Exporter(array, device=(CUDA, 0), dtype=named)


def on_gpu(q, k, v, **arrays):
    problem = Problem(q, k, v)
    problem.dense_q()
    problem.dense_k()
    problem.extend(**arrays)
    problem.finish()


def heads(head_dim, head_dim_v=None, dtype="float16", **arrays):
    head_dim_v = head_dim_v or head_dim
    on_gpu(device_array(2, 5, 4, head_dim, dtype=dtype), device_array(2, 7, 2, head_dim, dtype=dtype),
           device_array(2, 7, 2, head_dim_v, dtype=dtype), **arrays)


@pytest.mark.parametrize(("head_dim", "head_dim_v", "dtype", "error", "message"), [
    (64, 64, "float32", TypeError, "q: dtype float32, needs float16 or bfloat16 or float8_e4m3fn"),
    (20, 16, "float16", ValueError, "q: head_dim 20, needs a multiple of 8 for float16 on the GPU"),
    (16, 20, "bfloat16", ValueError, "v: head_dim 20, needs a multiple of 8 for bfloat16 on the GPU"),
    (24, 16, "float8_e4m3fn", ValueError, "q: head_dim 24, needs a multiple of 16 for float8_e4m3fn on the GPU"),
    (264, 64, "float16", NotImplementedError, "q: head_dim 264, needs at most 256 on the GPU"),
    (128, 512, "float16", NotImplementedError, "v: head_dim 512, needs at most 256 on the GPU"),
    (64, 512, "float16", NotImplementedError, "v: head_dim 512 and q's 64 without qv, needs qv on the GPU"),
    (576, 576, "float16", NotImplementedError, "q: head_dim 576, needs at most 256 on the GPU, or (q, v) of up to"),
])
def test_head_dims_of_the_gpu(head_dim, head_dim_v, dtype, error, message):
    with pytest.raises(error, match=re.escape(message)):
        heads(head_dim, head_dim_v, dtype)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(8, 8), (64, 256), (192, 128), (256, 256), (576, 512)])
def test_head_dims_that_the_gpu_takes(head_dim, head_dim_v):
    heads(head_dim, head_dim_v)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 512), (8, 8), (64, 264)])
def test_head_dims_with_qv(head_dim, head_dim_v):
    heads(head_dim, head_dim_v, qv=device_array(2, 5, 4, head_dim_v))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(72, 512), (64, 520), (576, 512)])
def test_head_dims_too_wide_for_qv(head_dim, head_dim_v):
    message = f"qv: given with head_dim {head_dim} and v's {head_dim_v}, needs at most 64 and 512 on the GPU"
    with pytest.raises(NotImplementedError, match=message):
        heads(head_dim, head_dim_v, qv=device_array(2, 5, 4, head_dim_v))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_last_dimension_is_contiguous_on_the_gpu(name):
    arrays = {"q": device_array(2, 5, 4, 16), "k": device_array(2, 7, 2, 16), "v": device_array(2, 7, 2, 16)}
    arrays[name] = device_array(*arrays[name].array.shape, strides=(1000, 100, 32, 2))
    with pytest.raises(ValueError, match=re.escape(f"{name}: stride 2 in the last dimension, needs 1 on the GPU")):
        on_gpu(**arrays)


@pytest.mark.parametrize("name", ["seqused_q", "seqused_k"])
def test_lengths_are_contiguous_on_the_gpu(name):
    with pytest.raises(ValueError, match=f"{name}: stride 2 in the last dimension, needs 1"):
        heads(64, **{name: device_array(2, dtype="int32", strides=(2,))})


def test_free_strides_are_taken_on_the_gpu():
    on_gpu(device_array(2, 5, 4, 16, strides=(-1000, 0, 17, 1)), device_array(2, 0, 2, 16, strides=(0, 0, 0, 0)),
           device_array(2, 0, 2, 16, strides=(0, 0, 0, 0)))


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("q", (2, 2**31, 4, 16), "q: rows 2147483648, needs at most 2147483647 on the GPU"),
    ("q", (2, 1, 2**31, 16), "q: num_heads 2147483648, needs at most 2147483647 on the GPU"),
    ("k", (2, 2**31, 2, 16), "k: rows 2147483648, needs at most 2147483647 on the GPU"),
])
def test_sizes_that_32_bits_do_not_hold(name, shape, message):
    arrays = {"q": device_array(2, 1, 4, 16), "k": device_array(2, 1, 2, 16)}
    arrays[name] = device_array(*shape, strides=(0, 0, 0, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        on_gpu(**arrays, v=arrays["k"])
