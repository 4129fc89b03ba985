"""fa3_backward past Python's checks: what it refuses, by status and sentence, and the workspace that it asks for."""

import ctypes

import pytest
from quantize_params import Array

import fa3

BF16 = 2


class Lengths(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int32), ("max_seqlen", ctypes.c_int32), ("cu_seqlens", ctypes.c_void_p),
                ("seqused", ctypes.c_void_p)]


class Mask(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("causal", "window_left", "window_right", "attention_chunk")]


class Dropout(ctypes.Structure):
    _fields_ = [("p", ctypes.c_float), ("seed_type", ctypes.c_int32), ("seed", ctypes.c_uint64),
                ("seed_data", ctypes.c_void_p)]


class Params(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t),
                *((name, ctypes.c_int32) for name in ("device", "dtype", "batch", "num_heads", "num_heads_kv",
                                                      "head_dim", "head_dim_v")),
                *((name, Array) for name in ("dout", "q", "k", "v", "out", "lse", "dlse", "dq", "dk", "dv")),
                ("dsinks", ctypes.c_void_p), ("queries", Lengths), ("keys", Lengths), ("mask", Mask),
                ("softmax_scale", ctypes.c_float), ("softcap", ctypes.c_float), ("sinks", ctypes.c_void_p),
                ("dropout", Dropout), ("deterministic", ctypes.c_int32)]


@pytest.fixture(scope="module")
def library():
    found = ctypes.CDLL(fa3.get_library())
    found.fa3_last_error.restype = ctypes.c_char_p
    return found


def params(batch=2, rows=300, heads=4, heads_kv=2, dim=128, **changes):
    filled = Params(struct_size=ctypes.sizeof(Params), dtype=BF16, batch=batch, num_heads=heads, num_heads_kv=heads_kv,
                    head_dim=dim, head_dim_v=dim, softmax_scale=0.1, mask=Mask(0, -1, -1, 0))
    filled.queries.rows = filled.keys.rows = rows
    for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv", "lse"):
        of = heads_kv if name[-1] in "kv" else heads
        getattr(filled, name).data = 4096
        getattr(filled, name).stride[:] = [rows * of * dim, of * dim, dim, 1]
    for name, value in changes.items():
        target, _, field = name.partition("__")
        if field == "stride":
            getattr(filled, target).stride[:] = value
        elif field:
            setattr(getattr(filled, target), field, value)
        else:
            setattr(filled, name, value)
    return filled


def workspace(library, filled):
    nbytes = ctypes.c_size_t(1)
    status = library.fa3_backward_workspace(ctypes.byref(filled), ctypes.byref(nbytes))
    return status, nbytes.value


@pytest.mark.parametrize(("changes", "status", "words"), [
    ({"struct_size": 8}, -5, "struct_size: 8, but this library's fa3_backward_params has "),
    ({"dtype": 3}, -4, "dtype: 3 is no fa3_dtype that q, k, v can have"),
    ({"dropout__p": 1.0}, -5, "dropout_p: 1, but it must be from 0 to below 1"),
    ({"dropout__seed_type": 3}, -4, "dropout_seed: type 3"),
    ({"dropout__seed_data": 4}, -5, "dropout_seed: its address is not a multiple of 8 bytes"),
    ({"batch": -1}, -5, "batch: -1 is negative"),
    ({"num_heads_kv": 3}, -5, "num_heads: 4, not a multiple of num_heads_kv 3"),
    ({"num_heads": 65536}, -5, "num_heads: 65536, but the backward takes at most 65535"),
    ({"head_dim": 12}, -2, "head_dim: 12"),
    ({"keys__rows": -1}, -5, "k: -1 rows"), ({"mask__window_left": -2}, -5, "window_size: (-2, -1)"),
    ({"softmax_scale": float("nan")}, -5, "softmax_scale: nan"), ({"softcap": -1.0}, -5, "softcap: -1"),
    ({"sinks": 4096}, -1, "sinks, dsinks: one is null"), ({"dsinks": 4096}, -1, "sinks, dsinks: one is null"),
    ({"lse__data": None}, -1, "lse: null data"),
    *(({f"{name}__data": 4097}, -5, f"{name}: its address is not a multiple of 2 bytes")
      for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")),
    *(({name: 4098}, -5, f"{which}: its address is not a multiple of 4 bytes") for name, which in {
        "lse__data": "lse", "dlse__data": "dlse", "queries__cu_seqlens": "cu_seqlens_q",
        "queries__seqused": "seqused_q", "keys__cu_seqlens": "cu_seqlens_k", "keys__seqused": "seqused_k"}.items()),
    ({"batch": 2**30 + 1}, -5, "batch: 1073741825, but at most 2^30"),
    ({"batch": 2**30, "queries__rows": 2**30}, -5, "q: 1073741824 x 1073741824 x 4 x 128 elements"),
    ({"batch": 2**20, "keys__rows": 2**20}, -5, "k: 1048576 x 1048576 x 2 x 128 elements"),
    ({"batch": 2**28, "queries__rows": 64, "keys__rows": 1}, -5, "2147483648 and 536870912 tiles"),
    ({"sinks": 4098, "dsinks": 4096}, -5, "sinks: its address"),
    ({"sinks": 4096, "dsinks": 4098}, -5, "dsinks: its address"),
    *(({f"{name}__data": None}, -1, f"{name}: null data") for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")),
    *(({f"{name}__stride": [0, 0, 0, 2]}, -5, f"{name}: stride 2 along head_dim") for name in ("dout", "dq", "dv"))])
def test_refused(library, changes, status, words):
    assert workspace(library, params(**changes)) == (status, 0)
    assert words in library.fa3_last_error().decode()


def test_a_workspace_off_its_alignment_is_refused(library):
    """The one that CUDA's allocators give has it."""
    assert library.fa3_backward(ctypes.byref(params()), ctypes.c_void_p(4096 + 8), None) == -5
    assert b"workspace: its address is not a multiple of 16 bytes" in library.fa3_last_error()


def test_workspace(library):
    """Two numbers a query, a sum of dq in fp32 for each tile of 64 queries and two turns, a counter, and what options
    ask for."""
    def plain(tiles):
        return tiles * 64 * (2 + 128) * 4 + -(-tiles * 2 * 4 // 256) * 256 + 256

    dense = plain(2 * 5 * 4)
    assert workspace(library, params()) == (0, dense)
    assert workspace(library, params(deterministic=1)) == (0, dense)
    assert workspace(library, params(sinks=4096, dsinks=4096)) == (0, dense + 256)
    assert workspace(library, params(q__data=4098)) == (0, dense + 2 * 300 * 4 * 128 * 2)
    assert workspace(library, params(rows=0)) == (0, 0)
    assert workspace(library, params(batch=1, rows=64, heads=65535, heads_kv=1)) == (0, plain(65535))
    assert workspace(library, params(batch=0)) == (0, 0)
    ragged = params(batch=7, queries__cu_seqlens=4096)
    assert workspace(library, ragged) == (0, plain((5 + 7) * 4))


GRADIENTS = ("dq", "dk", "dv")


def of_no_sequences(**changes):
    """All rows of the gradients are still to become 0."""
    return params(batch=0, queries__cu_seqlens=4096, keys__cu_seqlens=4096, **changes)


def test_a_ragged_batch_without_sequences_needs_its_arrays_and_no_workspace(library):
    assert workspace(library, of_no_sequences(sinks=4096, dsinks=4096)) == (0, 0)
    for name in GRADIENTS:
        assert workspace(library, of_no_sequences(**{f"{name}__data": None})) == (-1, 0)
        assert f"{name}: null data" in library.fa3_last_error().decode()
    nothing = {f"{name}__data": None for name in ("dout", "q", "k", "v", "out", "lse", *GRADIENTS)}
    assert workspace(library, of_no_sequences(queries__rows=0, keys__rows=0, **nothing)) == (0, 0)
    assert workspace(library, params(batch=0, **nothing)) == (0, 0)
