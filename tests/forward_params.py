"""fa3_forward_params of src/fa3.h for ctypes: for calls past Python's checks."""

import ctypes

from quantize_params import Array

DTYPES = {"float16": 1, "bfloat16": 2, "float8_e4m3fn": 3, "float32": 4}


def structure(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def ints(*names):
    return dict.fromkeys(names, ctypes.c_int32)


def pointers(*names):
    return dict.fromkeys(names, ctypes.c_void_p)


Lengths = structure("Lengths", **ints("rows", "max_seqlen"), **pointers("cu_seqlens", "seqused"))
Mask = structure("Mask", **ints("causal", "window_left", "window_right", "attention_chunk"))
Descale = structure("Descale", data=ctypes.c_void_p, stride=ctypes.c_int64 * 2, group=ctypes.c_int32)
Dropout = structure(
    "Dropout", p=ctypes.c_float, seed_type=ctypes.c_int32, seed=ctypes.c_uint64, seed_data=ctypes.c_void_p)
Cache = structure(
    "Cache", k_new=Array, v_new=Array, cu_seqlens_k_new=ctypes.c_void_p, **ints("rows_new", "seqlen"),
    page_table=ctypes.c_void_p, page_table_stride=ctypes.c_int64, **ints("max_pages", "page_size", "num_pages"),
    cache_batch_idx=ctypes.c_void_p, batch_entries=ctypes.c_int32,
    **pointers("cache_leftpad", "rotary_cos", "rotary_sin", "rotary_seqlens"),
    **ints("rotary_rows", "rotary_dim", "rotary_dtype", "rotary_interleaved"))
Params = structure(
    "Params", struct_size=ctypes.c_size_t,
    **ints("device", "dtype", "out_dtype", "batch", "num_heads", "num_heads_kv", "head_dim", "head_dim_v"),
    q=Array, k=Array, v=Array, out=Array, lse=Array, qv=Array, queries=Lengths, keys=Lengths, mask=Mask,
    softmax_scale=ctypes.c_float, softcap=ctypes.c_float, sinks=ctypes.c_void_p,
    q_descale=Descale, k_descale=Descale, v_descale=Descale, dropout=Dropout,
    cache=Cache, **ints("num_splits", "batch_invariant", "pack_gqa", "sm_margin", "tile_m", "tile_n", "fp8_accumulate"))


def address(array):
    return 0 if array is None else array.__array_interface__["data"][0]


def set_rows(field, array):
    """(batch, row, head, dim), or (row, head, dim)."""
    field.data = address(array)
    for axis, stride in enumerate(array.strides):
        field.stride[axis + 4 - array.ndim] = stride // array.itemsize
