"""The rules that one argument can break alone or against another: each a function that returns, or raises.

Every message names the argument, what it got, and what it needs: ``k: head_dim 96, but q has 128``.
"""

import math
import numbers
import operator

import numpy

CPU = 1  # DLPack's device types, as ArrayView.device_type has them
CUDA = 2

FP8 = "float8_e4m3fn"
HALF = ("float16", "bfloat16")
GPU_DTYPES = (*HALF, FP8)
CPU_DTYPES = (*GPU_DTYPES, "float32", "float64")

MAX_GPU_HEAD_DIM = 256
# (head_dim, head_dim_v) past 256 that Hopper kernels take: DeepSeek's MLA, with qv and absorbed.
MLA_HEAD_DIMS = {(64, 512), (576, 512)}

_INF = math.inf
_MAX_INT = 2**31 - 1
_MAX_SEED = 2**64 - 1
_MAX_ROWS = 2**30  # of a sequence, so that positions and a window add up in 32 bits


def integer(value, name, least, most=_MAX_INT):
    """`value` as an int from `least` to `most`, which by default is what the C interface's 32 bits hold."""
    if type(value) is not int:
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: got {type(value).__name__}, needs an int") from None
    if value < least:
        raise ValueError(f"{name}: {value}, needs at least {least}")
    if value > most:
        raise ValueError(f"{name}: {value}, needs at most {most}")
    return value


def number(value, name):
    """`value` as a finite float. Arrays are refused: reading one on a GPU would wait for it."""
    if type(value) is not float:
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: got {type(value).__name__}, needs a number")
        value = float(value)
    if not -_INF < value < _INF:
        raise ValueError(f"{name}: {value}, needs a finite number")
    return value


def flag(value, name):
    """`value` as a bool; 0 and 1 and NumPy's bools are taken, arrays are refused."""
    if value is True or value is False:
        return value
    if isinstance(value, numpy.bool_) or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name}: got {type(value).__name__}, needs True or False")


def window(value):
    """(left, right) of `window_size`, each -1 (unbounded) or more, and at most what a sequence can need."""
    try:
        left, right = value
    except (TypeError, ValueError):
        raise TypeError(f"window_size: got {value!r}, needs two ints (left, right)") from None
    left, right = integer(left, "window_size[0]", -1), integer(right, "window_size[1]", -1)
    return min(left, _MAX_ROWS), min(right, _MAX_ROWS)


def chunk(value):
    """`attention_chunk`, 0 (none) or more; one past the longest sequence is as good as that."""
    return min(integer(value, "attention_chunk", 0), _MAX_ROWS)


def dropout(probability, seed):
    """Refuse a dropout probability: out of range always, and above 0 while dropout is not built."""
    probability = number(probability, "dropout_p")
    if not 0 <= probability < 1:
        raise ValueError(f"dropout_p: {probability}, needs 0 ≤ dropout_p < 1")
    if seed is not None:
        integer(seed, "dropout_seed", 0, _MAX_SEED)
    if probability:
        raise NotImplementedError(f"dropout_p: {probability}, but dropout is not built yet; needs 0.0")


def needs(array, name, needed, needed_name):
    """An option that means nothing without another."""
    if array is not None and needed is None:
        raise ValueError(f"{needed_name}: got None, but {name} is given and needs it")


def together(first, first_name, second, second_name):
    """Two options that mean nothing apart."""
    needs(first, first_name, second, second_name)
    needs(second, second_name, first, first_name)


def without(array, name, other, other_name):
    """Two options that exclude each other."""
    if array is not None and other is not None:
        raise ValueError(f"{other_name}: given, but {name} is too, and needs it to be None")


def ndim(view, name, needed, axes):
    """An array of so many dimensions; `axes` names them."""
    if view.ndim != needed:
        raise ValueError(f"{name}: {view.ndim} dimensions, needs {needed}: {axes}")


def dtype(view, name, allowed):
    """One of the dtypes of `allowed`."""
    if view.dtype not in allowed:
        raise TypeError(f"{name}: dtype {view.dtype}, needs {' or '.join(allowed)}")


def same_dtype(view, name, other, other_name):
    """The dtype that another argument has."""
    if view.dtype != other.dtype:
        raise TypeError(f"{name}: dtype {view.dtype}, but {other_name} has {other.dtype}")


def shape(view, name, needed, axes):
    """Exactly this shape; `axes` names its dimensions."""
    if view.shape != needed:
        raise ValueError(f"{name}: shape {view.shape}, needs {needed}: {axes}")


def same_size(size, name, axis, other_size, other_name):
    """A size that another argument has too: ``k: head_dim 96, but q has 128``."""
    if size != other_size:
        raise ValueError(f"{name}: {axis} {size}, but {other_name} has {other_size}")


def contiguous_rows(view, name):
    """A last dimension of stride 1, which GPU kernels ask for; an array without elements has no strides."""
    if view.strides[-1] != 1 and view.shape[-1] > 1 and 0 not in view.shape:
        raise ValueError(f"{name}: stride {view.strides[-1]} in the last dimension, needs 1 on the GPU")


def no_overlap(view, name):
    """No two elements at one address: what is written must have one place each.

    Dimensions in order of stride must each step over all that the smaller ones span. That refuses stride 0
    and every real overlap, and of the others only layouts that interleave two dimensions.
    """
    if 0 in view.shape:
        return
    span = 0
    axes = zip(view.strides, view.shape, strict=True)
    for stride, size in sorted((abs(stride), size) for stride, size in axes if size > 1):
        if stride <= span:
            raise ValueError(f"{name}: shape {view.shape} with strides {view.strides} lets elements overlap, "
                             "needs a place in memory for each")
        span += stride * (size - 1)


def not_input(view, name, inputs):
    """Not the memory of an input, which is read while `out` is written. Looks only for the slip of out=q."""
    for other, other_name in inputs:
        if view.data == other.data and 0 not in view.shape and 0 not in other.shape:
            raise ValueError(f"{name}: is the memory of {other_name}, needs memory of its own")


def head_dims(head_dim, head_dim_v, q_dtype, has_qv, v_name):
    """Head dims that Hopper kernels take: multiples of 8 (16 in fp8) up to 256, and MLA's pairs."""
    multiple = 16 if q_dtype == FP8 else 8
    if head_dim % multiple:
        raise ValueError(f"q: head_dim {head_dim}, needs a multiple of {multiple} for {q_dtype} on the GPU")
    if head_dim_v % multiple:
        raise ValueError(f"{v_name}: head_dim {head_dim_v}, "
                         f"needs a multiple of {multiple} for {q_dtype} on the GPU")
    if head_dim <= MAX_GPU_HEAD_DIM and head_dim_v <= MAX_GPU_HEAD_DIM:
        return
    if (head_dim, head_dim_v) not in MLA_HEAD_DIMS:
        name, got = ("q", head_dim) if head_dim > MAX_GPU_HEAD_DIM else (v_name, head_dim_v)
        raise NotImplementedError(f"{name}: head_dim {got}, needs at most {MAX_GPU_HEAD_DIM} on the GPU, "
                                  f"or (q, {v_name}) of (64, 512) with qv or (576, 512)")
    if head_dim == 64 and not has_qv:
        raise NotImplementedError(f"{v_name}: head_dim 512 and q's 64 without qv, needs qv on the GPU")
