"""fa3_quantize_params of src/fa3.h, filled from NumPy's or anybody's strides, for calls past Python's checks."""

import ctypes

import numpy as np

DTYPES = {"float16": 1, "bfloat16": 2, "float32": 4}
GRANULARITIES = ("tensor", "head", "batch_head")


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class Params(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t),
                *((name, ctypes.c_int32) for name in ("device", "dtype", "granularity", "hadamard", "batch", "rows",
                                                      "num_heads", "head_dim")),
                ("cu_seqlens", ctypes.c_void_p), ("x", Array), ("out", Array), ("descale", ctypes.c_void_p),
                ("descale_stride", ctypes.c_int64 * 2)]


def params(shape, dtype, granularity, hadamard, *, x, out, descale, x_strides, out_strides, descale_strides,
           cu_seqlens=0, batch=None):
    """The struct of a call; arrays are addresses, strides count elements.

    Parameters
    ----------
    shape : tuple of int
        (batch, rows, heads, dim), or (rows, heads, dim).
    batch : int, optional
        With cu_seqlens, its sequences.
    """
    filled = Params(struct_size=ctypes.sizeof(Params), dtype=DTYPES[dtype], hadamard=hadamard,
                    granularity=GRANULARITIES.index(granularity), cu_seqlens=cu_seqlens, descale=descale)
    ragged = len(shape) == 3
    filled.batch = batch if batch is not None else 1 if ragged else shape[0]
    filled.rows, filled.num_heads, filled.head_dim = shape[-3:]
    for array, address, strides in ((filled.x, x, x_strides), (filled.out, out, out_strides)):
        array.data = address
        for axis, stride in enumerate(strides):
            array.stride[axis + ragged] = stride
    for axis, stride in enumerate(descale_strides):
        filled.descale_stride[2 - len(descale_strides) + axis] = stride
    return filled


def near(codes, descale, expected, expected_descale):
    """Results of which one was rotated by sums in another order: NaN alike, and few codes are their neighbours."""
    codes, expected = (np.asarray(x).view(np.uint8) for x in (codes, expected))
    nan = expected & 0x7F == 0x7F
    place = [np.where(x & 0x80, -1, 1) * (x & 0x7F).astype(np.int32) for x in (codes, expected)]
    apart = np.where(nan, 0, np.abs(place[0] - place[1]))
    np.testing.assert_allclose(descale, expected_descale, rtol=1e-6)
    return ((codes & 0x7F == 0x7F) == nan).all() and apart.max() <= 1 and apart.sum() <= 2 + 0.002 * apart.size
