# cython: language_level=3, boundscheck=False, wraparound=False
"""The rules that one argument can break alone or against another: each a function that returns, or raises.

Every message names the argument, what it got, and what it needs: ``k: head_dim 96, but q has 128``. Every call pays
for these rules, so they look at C numbers, and make objects only for a message.
"""
cimport cython
from libc.float cimport FLT_MIN
from libc.math cimport isfinite
from libc.stdint cimport int64_t, uintptr_t

from fa3._view cimport ArrayView

import numbers
import operator

import numpy

from fa3 import _dtypes

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1

cdef str FP8 = _dtypes.FP8

cdef enum:
    MAX_GPU_HEAD_DIM = 256
    MAX_LATENT_HEAD_DIM = 64          # with qv: q's and k's
    MAX_LATENT_HEAD_DIM_V = 512       # and v's
    MAX_QUANTIZED_HEAD_DIM = 576      # the largest that any attention takes
    MAX_INT = 0x7fffffff              # what the C interface's 32 bits hold
    MAX_TRIES = 100000                # to tell two arrays apart: less than a millisecond
    MAX_ROWS = 1 << 30                # of a sequence, so that positions and a window add up in 32 bits

cdef object MAX_SEED = 2**64 - 1
# (head_dim, head_dim_v) past 256 that Hopper kernels take without qv: absorbed, where v is the first columns of k.
cdef tuple ABSORBED_HEAD_DIMS = (MAX_LATENT_HEAD_DIM + MAX_LATENT_HEAD_DIM_V, MAX_LATENT_HEAD_DIM_V)


# ---- numbers --------------------------------------------------------------------------------------------

cdef as_int(value, str name):
    """`value` as a Python int."""
    if type(value) is int:
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {type(value).__name__}, needs an int") from None


cdef int between(value, str name, least, most) except -1:
    """An int from `least` to `most`, however long."""
    if value < least:
        raise ValueError(f"{name}: {value}, needs at least {least}")
    if value > most:
        raise ValueError(f"{name}: {value}, needs at most {most}")
    return 0


cdef int64_t integer(value, str name, int64_t least, int64_t most=MAX_INT) except? -2:
    """`value` as an int from `least` to `most`, which by default is what the C interface's 32 bits hold."""
    cdef int overflow = 0
    cdef int64_t found
    value = as_int(value, name)
    found = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow or found < least or found > most:
        between(value, name, least, most)
    return found


cdef double number(value, str name) except? -1:
    """`value` as a float that is finite in fp32 too. Arrays are refused: reading one on a GPU would wait for it."""
    cdef double found = value if type(value) is float else as_float(value, name)
    if not isfinite(<float>found):
        raise ValueError(f"{name}: {found}, needs a finite {'float32' if isfinite(found) else 'number'}")
    return found


cdef double as_float(value, str name) except? -1:
    """A real number of another type as a float."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: past every float64, needs a finite float32") from None


cdef double cap(value, str name) except? -1:
    """A softcap: 0 (none), or a number that fp32 can divide by without losing its digits."""
    cdef double found = number(value, name)
    if found < 0:
        raise ValueError(f"{name}: {found}, needs at least 0")
    if 0 < found < FLT_MIN:
        raise ValueError(f"{name}: {found}, needs 0 or at least {FLT_MIN}, float32's smallest normal number")
    return found


cdef bint flag(value, str name) except -1:
    """`value` as a bool; 0 and 1 and NumPy's bools are taken, arrays are refused."""
    if value is True:
        return True
    if value is False:
        return False
    if isinstance(value, numpy.bool_) or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name}: got {type(value).__name__}, needs True or False")


cdef int window(value, int *left, int *right) except -1:
    """(left, right) of `window_size`, each -1 (unbounded) or more, and at most what a sequence can need."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise TypeError(f"window_size: got {value!r}, needs two ints (left, right)") from None
    left[0] = <int>min(integer(first, "window_size[0]", -1), <int64_t>MAX_ROWS)
    right[0] = <int>min(integer(second, "window_size[1]", -1), <int64_t>MAX_ROWS)
    return 0


cdef int chunk(value) except -1:
    """`attention_chunk`, 0 (none) or more; one past the longest sequence is as good as that."""
    return <int>min(integer(value, "attention_chunk", 0), <int64_t>MAX_ROWS)


cdef double probability(value, str name) except? -1:
    """`value` from 0 to below 1, in the C interface's fp32 too."""
    cdef double found = number(value, name)
    if found < 0 or <float>found >= 1:
        raise ValueError(f"{name}: {found}, needs 0 ≤ {name} < 1")
    return found


cdef object seed(value, str name):
    """`value` as an int of 64 bits, or None where it is an array, which may lie on a GPU and is not read here."""
    if type(value) is not int and not isinstance(value, numbers.Integral):
        if hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__"):
            return None
        raise TypeError(f"{name}: got {type(value).__name__}, needs an int, or an array that holds one")
    value = as_int(value, name)
    between(value, name, 0, MAX_SEED)
    return value


# ---- options that need each other -----------------------------------------------------------------------

cdef int needs(array, str name, needed, str needed_name) except -1:
    """An option that means nothing without another."""
    if array is not None and needed is None:
        raise ValueError(f"{needed_name}: got None, but {name} is given and needs it")
    return 0


cdef int together(first, str first_name, second, str second_name) except -1:
    """Two options that mean nothing apart."""
    needs(first, first_name, second, second_name)
    return needs(second, second_name, first, first_name)


cdef int without(array, str name, other, str other_name) except -1:
    """Two options that exclude each other."""
    if array is not None and other is not None:
        raise ValueError(f"{other_name}: given, but {name} is too, and needs it to be None")
    return 0


# ---- arrays ---------------------------------------------------------------------------------------------

cdef bint empty(ArrayView view) noexcept:
    """An array without elements, which has no strides, and no memory to share."""
    cdef int axis
    for axis in range(view.ndim):
        if view.c_shape[axis] == 0:
            return True
    return False


cdef int ndim(ArrayView view, str name, int needed, str axes) except -1:
    """An array of so many dimensions; `axes` names them."""
    if view.ndim != needed:
        raise ValueError(f"{name}: {view.ndim} dimensions, needs {needed}: {axes}")
    return 0


cdef int dtype(ArrayView view, str name, tuple allowed) except -1:
    """One of the dtypes of `allowed`."""
    if view.dtype not in allowed:
        raise TypeError(f"{name}: dtype {view.dtype}, needs {' or '.join(allowed)}")
    return 0


cdef int same_dtype(ArrayView view, str name, ArrayView other, str other_name) except -1:
    """The dtype that another argument has."""
    if view.dtype != other.dtype:
        raise TypeError(f"{name}: dtype {view.dtype}, but {other_name} has {other.dtype}")
    return 0


cdef int shape(ArrayView view, str name, int needed_ndim, const int64_t *needed, str axes) except -1:
    """Exactly this shape; `axes` names its dimensions."""
    cdef int axis = 0
    if view.ndim == needed_ndim:
        while axis < needed_ndim and view.c_shape[axis] == needed[axis]:
            axis += 1
        if axis == needed_ndim:
            return 0
    needed_shape = tuple([needed[axis] for axis in range(needed_ndim)])
    raise ValueError(f"{name}: shape {view.shape}, needs {needed_shape}: {axes}")


cdef int same_size(int64_t size, str name, str axis, int64_t other_size, str other_name) except -1:
    """A size that another argument has too: ``k: head_dim 96, but q has 128``."""
    if size != other_size:
        raise ValueError(f"{name}: {axis} {size}, but {other_name} has {other_size}")
    return 0


cdef int contiguous_rows(ArrayView view, str name) except -1:
    """A last dimension of stride 1, which GPU kernels ask for; an array without elements has no strides."""
    cdef int last = view.ndim - 1
    if view.c_strides[last] != 1 and view.c_shape[last] > 1 and not empty(view):
        raise ValueError(f"{name}: stride {view.c_strides[last]} in the last dimension, needs 1 on the GPU")
    return 0


cdef int no_overlap(ArrayView view, str name) except -1:
    """No two elements at one address: what is written must have one place each.

    Dimensions in order of stride must each step over all that the smaller ones span. That refuses stride 0
    and every real overlap, and of the others only layouts that interleave two dimensions.
    """
    cdef int64_t[MAX_NDIM] strides
    cdef int64_t[MAX_NDIM] sizes
    cdef int64_t stride, span = 0
    cdef int count = 0, axis, place
    if empty(view):
        return 0
    for axis in range(view.ndim):
        if view.c_shape[axis] == 1:
            continue
        stride = view.c_strides[axis]
        if stride < 0:
            stride = -stride
        place = count
        while place > 0 and strides[place - 1] > stride:
            strides[place] = strides[place - 1]
            sizes[place] = sizes[place - 1]
            place -= 1
        strides[place] = stride
        sizes[place] = view.c_shape[axis]
        count += 1
    for axis in range(count):
        if strides[axis] <= span:
            raise ValueError(f"{name}: shape {view.shape} with strides {view.strides} lets elements overlap, "
                             "needs a place in memory for each")
        span += strides[axis] * (sizes[axis] - 1)
    return 0


cdef void extent(ArrayView view, uintptr_t *lowest, uintptr_t *end) noexcept:
    """The addresses between which the elements of an array lie."""
    cdef int64_t distance
    cdef int axis
    lowest[0] = end[0] = view.data
    for axis in range(view.ndim):
        distance = view.c_strides[axis] * (view.c_shape[axis] - 1) * view.itemsize
        if distance < 0:
            lowest[0] += distance
        else:
            end[0] += distance
    end[0] += view.itemsize


cdef int apart(ArrayView view, str name, ArrayView other, str other_name) except -1:
    """No byte in common: not with an input, which is read while `out` is written, nor of two results.

    Arrays may interleave, as q, k and v of one packed array do.
    """
    cdef uintptr_t lowest, end, other_lowest, other_end
    if other is None or empty(view) or empty(other):
        return 0
    extent(view, &lowest, &end)
    extent(other, &other_lowest, &other_end)
    if (lowest < other_end and other_lowest < end
            and meet(view, other, <int64_t>other_end - <int64_t>lowest - 1)):
        raise ValueError(f"{name}: shares memory with {other_name}, needs memory of its own")
    return 0


cdef bint meet(ArrayView view, ArrayView other, int64_t distance) noexcept:
    """Whether two arrays have a byte in common; `distance` is from the first byte of `view` to the last of `other`.

    Counted from there, up in `view` and down in `other`, each dimension is so many equal steps, and so are the bytes
    of an element: steps that add up to the distance meet. Dimensions of one stride are one; arrays of one layout have
    few then, of which each leaves few counts of the next smaller open.
    """
    cdef int64_t[2 * MAX_NDIM + 1] steps
    cdef int64_t[2 * MAX_NDIM + 1] counts
    cdef int count = 1, tries = MAX_TRIES
    steps[0], counts[0] = 1, view.itemsize + other.itemsize - 2
    count = add_steps(steps, counts, count, view)
    count = add_steps(steps, counts, count, other)
    return add_up(steps, counts, count - 1, distance, &tries)


cdef int add_steps(int64_t *steps, int64_t *counts, int count, ArrayView view) noexcept:
    """Add the steps of an array's dimensions to a list in order of their size; returns how many sizes there are."""
    cdef int64_t step
    cdef int axis, place, i
    for axis in range(view.ndim):
        step = abs(view.c_strides[axis]) * view.itemsize
        if step == 0 or view.c_shape[axis] == 1:
            continue
        place = count
        while steps[place - 1] > step:
            place -= 1
        if steps[place - 1] == step:
            counts[place - 1] += view.c_shape[axis] - 1
            continue
        for i in range(count, place, -1):
            steps[i], counts[i] = steps[i - 1], counts[i - 1]
        steps[place], counts[place] = step, view.c_shape[axis] - 1
        count += 1
    return count


@cython.cdivision(True)
cdef bint add_up(const int64_t *steps, const int64_t *counts, int last, int64_t distance, int *tries) noexcept:
    """Whether some of the steps up to the `last` come to the distance; what takes too many tries counts as if so."""
    cdef int64_t below = 0, least, most, taken
    cdef int i
    tries[0] -= 1
    if tries[0] < 0:
        return True
    if last == 0:  # single bytes
        return distance <= counts[0]
    for i in range(last):
        below += steps[i] * counts[i]
    most = min(counts[last], distance // steps[last])
    least = 0 if distance <= below else (distance - below - 1) // steps[last] + 1
    for taken in range(least, most + 1):
        if add_up(steps, counts, last - 1, distance - taken * steps[last], tries):
            return True
    return False


cdef int fits(int64_t size, str name, str axis) except -1:
    """A size that the C interface's 32 bits hold."""
    if size > MAX_INT:
        raise ValueError(f"{name}: {axis} {size}, needs at most {MAX_INT} on the GPU")
    return 0


cdef int head_dims(int64_t head_dim, int64_t head_dim_v, str q_dtype, bint has_qv, str v_name) except -1:
    """Head dims that Hopper kernels take: multiples of 8 (16 in fp8) up to 256, and those of latent attention."""
    cdef int multiple = 16 if q_dtype == FP8 else 8
    if head_dim % multiple:
        raise ValueError(f"q: head_dim {head_dim}, needs a multiple of {multiple} for {q_dtype} on the GPU")
    if head_dim_v % multiple:
        raise ValueError(f"{v_name}: head_dim {head_dim_v}, "
                         f"needs a multiple of {multiple} for {q_dtype} on the GPU")
    if has_qv:
        if head_dim <= MAX_LATENT_HEAD_DIM and head_dim_v <= MAX_LATENT_HEAD_DIM_V:
            return 0
        raise NotImplementedError(f"qv: given with head_dim {head_dim} and {v_name}'s {head_dim_v}, needs at most "
                                  f"{MAX_LATENT_HEAD_DIM} and {MAX_LATENT_HEAD_DIM_V} on the GPU")
    if head_dim <= MAX_GPU_HEAD_DIM and head_dim_v <= MAX_GPU_HEAD_DIM:
        return 0
    if head_dim <= MAX_LATENT_HEAD_DIM and head_dim_v <= MAX_LATENT_HEAD_DIM_V:
        raise NotImplementedError(f"{v_name}: head_dim {head_dim_v} and q's {head_dim} without qv, "
                                  "needs qv on the GPU")
    if (head_dim, head_dim_v) != ABSORBED_HEAD_DIMS:
        name, got = ("q", head_dim) if head_dim > MAX_GPU_HEAD_DIM else (v_name, head_dim_v)
        raise NotImplementedError(f"{name}: head_dim {got}, needs at most {MAX_GPU_HEAD_DIM} on the GPU, "
                                  f"or (q, {v_name}) of up to (64, 512) with qv, or of (576, 512)")
    return 0


cdef int quantized_head_dim(int64_t head_dim) except -1:
    """A head dim that the GPU can quantise."""
    if head_dim % 8 or not 8 <= head_dim <= MAX_QUANTIZED_HEAD_DIM:
        raise ValueError(f"x: head_dim {head_dim}, needs a multiple of 8 up to {MAX_QUANTIZED_HEAD_DIM} on the GPU")
    return 0
