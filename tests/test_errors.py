"""One test per rule on arguments: the exception, and a message that says which argument, what it got, what it needs.

Each case starts from a call that works and breaks one thing. The GPU's own rules are in test_gpu_rules.py.
"""

import enum
import pickle
import re
from fractions import Fraction

import frameworks
import ml_dtypes
import numpy as np
import pytest

import fa3
from fa3._errors import raise_status

BF16 = ml_dtypes.bfloat16
FP8 = ml_dtypes.float8_e4m3fn


class Named(enum.StrEnum):
    SINGLE = "float32"


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def ints(*values):
    return np.array(values, np.int32)


def read_only(*shape):
    array = zeros(*shape)
    array.flags.writeable = False
    return array


# Calls that work: batch 2, seqlen_q 5, seqlen_k 7, 4 query heads on 2, head_dim 16, head_dim_v 8.
Q, K, V = zeros(2, 5, 4, 16), zeros(2, 7, 2, 16), zeros(2, 7, 2, 8)


def dense(**changes):
    return fa3.flash_attn_func(**{"q": Q, "k": K, "v": V, **changes})


def varlen(**changes):
    call = {"q": zeros(10, 4, 16), "k": zeros(14, 2, 16), "v": zeros(14, 2, 8), "cu_seqlens_q": ints(0, 5, 10),
            "cu_seqlens_k": ints(0, 7, 14)}
    return fa3.flash_attn_varlen_func(**{**call, **changes})


def kvcache(**changes):
    return fa3.flash_attn_with_kvcache(**{"q": Q, "k_cache": K.copy(), "v_cache": V.copy(), **changes})


def append(**changes):
    return kvcache(**{"k": zeros(2, 3, 2, 16), "v": zeros(2, 3, 2, 8), "cache_seqlens": ints(4, 0), **changes})


def rotary(**changes):
    return append(**{"rotary_cos": zeros(16, 8), "rotary_sin": zeros(16, 8), **changes})


def paged(**changes):
    call = {"k_cache": zeros(6, 4, 2, 16), "v_cache": zeros(6, 4, 2, 8), "page_table": ints([0, 1], [2, 3])}
    return kvcache(**{**call, **changes})


def fp8(**changes):
    return dense(**{"q": Q.astype(FP8), "k": K.astype(FP8), "v": V.astype(FP8), **changes})


def narrow(**changes):
    call = {"q": zeros(10, 4, 16, dtype=np.float16), "k": zeros(14, 2, 16, dtype=FP8), "v": zeros(14, 2, 8, dtype=FP8)}
    return varlen(**{**call, **changes})


def pages(**changes):
    call = {"k": zeros(6, 4, 2, 16), "v": zeros(6, 4, 2, 8), "page_table": ints([0, 1], [2, 3]), "cu_seqlens_k": None,
            "seqused_k": ints(7, 6)}
    return varlen(**{**call, **changes})


def combine(**changes):
    call = {"out_partial": zeros(3, 2, 5, 4, 8), "lse_partial": zeros(3, 2, 5, 4)}
    return fa3.flash_attn_combine(**{**call, **changes})


def backward(**changes):
    call = {"dout": zeros(2, 5, 4, 8), "q": Q, "k": K, "v": V, "out": zeros(2, 5, 4, 8), "lse": zeros(2, 4, 5)}
    return fa3.flash_attn_backward(**{**call, **changes})


def varlen_backward(**changes):
    call = {"dout": zeros(10, 4, 8), "q": zeros(10, 4, 16), "k": zeros(14, 2, 16), "v": zeros(14, 2, 8),
            "out": zeros(10, 4, 8), "lse": zeros(4, 10), "cu_seqlens_q": ints(0, 5, 10),
            "cu_seqlens_k": ints(0, 7, 14)}
    return fa3.flash_attn_varlen_backward(**{**call, **changes})


CALLS = [dense, varlen, kvcache, append, rotary, paged, fp8, narrow, pages, combine, backward, varlen_backward]

# (call, what to change, exception, message)
RULES = [
    # arrays at all, and of which dtype
    (dense, {"q": [1.0]}, TypeError, "q: "),
    (dense, {"k": 3}, TypeError, "k: "),
    (dense, {"sinks": "none"}, TypeError, "sinks: "),
    (dense, {"q": Q.astype(np.int32)}, TypeError,
     "q: dtype int32, needs float16 or bfloat16 or float8_e4m3fn or float32 or float64"),
    (dense, {"k": K.astype(np.float16)}, TypeError, "k: dtype float16, but q has float32"),
    (dense, {"v": V.astype(BF16)}, TypeError, "v: dtype bfloat16, but q has float32"),
    (dense, {"seqused_q": np.array([1, 2])}, TypeError, "seqused_q: dtype int64, needs int32"),
    (dense, {"seqused_k": zeros(2)}, TypeError, "seqused_k: dtype float32, needs int32"),
    (dense, {"sinks": np.zeros(4)}, TypeError, "sinks: dtype float64, needs float32"),
    (dense, {"qv": zeros(2, 5, 4, 8, dtype=np.float16)}, TypeError, "qv: dtype float16, but q has float32"),
    (varlen, {"cu_seqlens_q": np.array([0, 5, 10])}, TypeError, "cu_seqlens_q: dtype int64, needs int32"),
    (varlen, {"cu_seqlens_k": np.array([0, 7, 14])}, TypeError, "cu_seqlens_k: dtype int64, needs int32"),
    (kvcache, {"cache_seqlens": np.array([3, 4])}, TypeError, "cache_seqlens: dtype int64, needs int32"),
    (kvcache, {"cache_batch_idx": np.array([0, 1])}, TypeError, "cache_batch_idx: dtype int64, needs int32"),
    (kvcache, {"cache_leftpad": np.array([0, 1])}, TypeError, "cache_leftpad: dtype int64, needs int32"),
    (paged, {"page_table": np.array([[0], [1]])}, TypeError, "page_table: dtype int64, needs int32"),
    (append, {"k": zeros(2, 3, 2, 16, dtype=np.float16)}, TypeError, "k: dtype float16, but k_cache has float32"),
    (append, {"v": zeros(2, 3, 2, 8, dtype=np.float16)}, TypeError, "v: dtype float16, but v_cache has float32"),
    (rotary, {"rotary_cos": np.zeros((16, 8))}, TypeError, "rotary_cos: dtype float64, needs float32"),
    (rotary, {"rotary_sin": zeros(16, 8, dtype=np.float16)}, TypeError,
     "rotary_sin: dtype float16, needs float32"),
    (fp8, {"q_descale": np.ones(())}, TypeError, "q_descale: dtype float64, needs float32"),
    (combine, {"out_partial": zeros(3, 2, 5, 4, 8, dtype=np.float16)}, TypeError,
     "out_partial: dtype float16, needs float32"),
    (combine, {"lse_partial": np.zeros((3, 2, 5, 4))}, TypeError, "lse_partial: dtype float64, needs float32"),
    # q, k, v
    (dense, {"q": zeros(5, 4, 16)}, ValueError,
     "q: 3 dimensions, needs 4: (batch, seqlen_q, num_heads, head_dim)"),
    (dense, {"k": zeros(7, 2, 16)}, ValueError,
     "k: 3 dimensions, needs 4: (batch, seqlen_k, num_heads_kv, head_dim)"),
    (dense, {"v": zeros(7, 2, 8)}, ValueError, "v: 3 dimensions, needs 4: "),
    (dense, {"k": zeros(3, 7, 2, 16), "v": zeros(3, 7, 2, 8)}, ValueError, "k: batch 3, but q has 2"),
    (dense, {"v": zeros(1, 7, 2, 8)}, ValueError, "v: batch 1, but k has 2"),
    (dense, {"v": zeros(2, 6, 2, 8)}, ValueError, "v: seqlen_k 6, but k has 7"),
    (dense, {"v": zeros(2, 7, 4, 8)}, ValueError, "v: num_heads_kv 4, but k has 2"),
    (dense, {"k": zeros(2, 7, 2, 24)}, ValueError, "k: head_dim 24, but q has 16"),
    (dense, {"q": zeros(2, 5, 3, 16)}, ValueError, "k: num_heads_kv 2, needs a divisor of q's num_heads 3"),
    (dense, {"k": zeros(2, 7, 0, 16), "v": zeros(2, 7, 0, 8)}, ValueError,
     "k: num_heads_kv 0, needs a divisor of q's num_heads 4"),
    (dense, {"q": zeros(2, 5, 4, 0), "k": zeros(2, 7, 2, 0)}, ValueError, "q: head_dim 0, needs at least 1"),
    (dense, {"v": zeros(2, 7, 2, 0)}, ValueError, "v: head_dim 0, needs at least 1"),
    (varlen, {"q": Q}, ValueError, "q: 4 dimensions, needs 3: (total_q, num_heads, head_dim)"),
    (varlen, {"k": K, "v": V}, ValueError, "k: 4 dimensions, needs 3: (total_k, num_heads_kv, head_dim)"),
    (varlen, {"v": zeros(13, 2, 8)}, ValueError, "v: total_k 13, but k has 14"),
    # where sequences are
    (varlen, {"cu_seqlens_q": ints([0, 5])}, ValueError, "cu_seqlens_q: shape (1, 2), needs (batch + 1,)"),
    (varlen, {"cu_seqlens_q": ints()}, ValueError, "cu_seqlens_q: shape (0,), needs (batch + 1,)"),
    (varlen, {"cu_seqlens_k": ints(0, 14)}, ValueError, "cu_seqlens_k: shape (2,), needs (3,): (batch + 1,)"),
    (varlen, {"cu_seqlens_k": None}, ValueError, "cu_seqlens_k: got None, needs int32 (batch + 1,), or a page_table"),
    (varlen, {"max_seqlen_q": -1}, ValueError, "max_seqlen_q: -1, needs at least 0"),
    (varlen, {"max_seqlen_k": 1.5}, TypeError, "max_seqlen_k: got float, needs an int"),
    (dense, {"seqused_q": ints(1)}, ValueError, "seqused_q: shape (1,), needs (2,): (batch,)"),
    (dense, {"seqused_k": ints([1, 2])}, ValueError, "seqused_k: shape (1, 2), needs (2,): (batch,)"),
    # optional arrays
    (dense, {"sinks": zeros(2)}, ValueError, "sinks: shape (2,), needs (4,): (num_heads,)"),
    (dense, {"qv": zeros(2, 5, 4, 16)}, ValueError,
     "qv: shape (2, 5, 4, 16), needs (2, 5, 4, 8): q's shape with head_dim_v"),
    (dense, {"q_descale": np.ones((), "f")}, ValueError,
     "q_descale: needs q of dtype float8_e4m3fn, but q has float32"),
    (dense, {"k_descale": 1.0}, ValueError, "k_descale: needs q of dtype float8_e4m3fn, but q has float32"),
    (fp8, {"q_descale": 1e39}, ValueError, "q_descale: 1e+39, needs a finite float32"),
    (fp8, {"q_descale": True}, TypeError, "q_descale: "), (fp8, {"q_descale": np.True_}, TypeError, "q_descale: "),
    (fp8, {"q_descale": np.complex64(1)}, TypeError, "q_descale: got complex64, needs a number"),
    (fp8, {"q_descale": zeros(3)}, ValueError, "q_descale: shape (3,), needs () or (2,) or (2, 2) or (4,) or (2, 4)"),
    (fp8, {"k_descale": zeros(4)}, ValueError, "k_descale: shape (4,), needs () or (2,) or (2, 2)"),
    (fp8, {"v_descale": zeros(3, 2)}, ValueError, "v_descale: shape (3, 2), needs () or (2,) or (2, 2)"),
    # numbers
    (dense, {"softmax_scale": "1"}, TypeError, "softmax_scale: got str, needs a number"),
    (dense, {"softmax_scale": zeros(1)}, TypeError, "softmax_scale: got ndarray, needs a number"),
    (dense, {"softmax_scale": float("nan")}, ValueError, "softmax_scale: nan, needs a finite number"),
    (dense, {"softmax_scale": float("inf")}, ValueError, "softmax_scale: inf, needs a finite number"),
    (dense, {"softmax_scale": 10**400}, ValueError,
     "softmax_scale: past every float64, needs a finite float32"),
    (dense, {"softmax_scale": 1e39}, ValueError, "softmax_scale: 1e+39, needs a finite float32"),
    (dense, {"softmax_scale": Fraction(-10**400)}, ValueError, "softmax_scale: past every float64"),
    (dense, {"causal": "yes"}, TypeError, "causal: got str, needs True or False"),
    (dense, {"window_size": 5}, TypeError, "window_size: got 5, needs two ints (left, right)"),
    (dense, {"window_size": (1, 2, 3)}, TypeError, "window_size: got (1, 2, 3), needs two ints (left, right)"),
    (dense, {"window_size": (-2, 0)}, ValueError, "window_size[0]: -2, needs at least -1"),
    (dense, {"window_size": (0, -2)}, ValueError, "window_size[1]: -2, needs at least -1"),
    (dense, {"window_size": (0.5, 0)}, TypeError, "window_size[0]: got float, needs an int"),
    (dense, {"attention_chunk": -1}, ValueError, "attention_chunk: -1, needs at least 0"),
    (dense, {"softcap": -1.0}, ValueError, "softcap: -1.0, needs at least 0"),
    (dense, {"softcap": float("inf")}, ValueError, "softcap: inf, needs a finite number"),
    (dense, {"softcap": 1e39}, ValueError, "softcap: 1e+39, needs a finite float32"),
    (dense, {"softcap": 1e-40}, ValueError, "softcap: 1e-40, needs 0 or at least 1.17549435"),
    (backward, {"softcap": 10**400}, ValueError, "softcap: past every float64"),
    (dense, {"dropout_p": 10**400}, ValueError, "dropout_p: past every float64"),
    (dense, {"num_splits": -1}, ValueError, "num_splits: -1, needs at least 0"),
    (dense, {"num_splits": 2**31}, ValueError, "num_splits: 2147483648, needs at most 2147483647"),
    (dense, {"batch_invariant": 2}, TypeError, "batch_invariant: got int, needs True or False"),
    (dense, {"pack_gqa": "auto"}, TypeError, "pack_gqa: got str, needs True or False"),
    (dense, {"sm_margin": -1}, ValueError, "sm_margin: -1, needs at least 0"),
    (dense, {"fp8_accumulate": 0}, ValueError, "fp8_accumulate: 0, needs None with q of dtype float32"),
    (dense, {"dropout_p": 1.0}, ValueError, "dropout_p: 1.0, needs 0 ≤ dropout_p < 1"),
    (dense, {"dropout_p": -0.1}, ValueError, "dropout_p: -0.1, needs 0 ≤ dropout_p < 1"),
    (dense, {"dropout_p": 0.1}, ValueError,
     "dropout_seed: got None, but dropout_p is 0.1 and needs one: an int, or an array that holds one"),
    (dense, {"dropout_p": 1 - 1e-9}, ValueError, "dropout_p: 0.999999999, needs 0 ≤ dropout_p < 1"),  # 1 in fp32
    (dense, {"dropout_seed": 1.5}, TypeError, "dropout_seed: got float, needs an int, or an array that holds one"),
    (dense, {"dropout_seed": np.ones(())}, TypeError,
     "dropout_seed: dtype float64, needs int64 or uint64 or int32 or uint32"),
    (dense, {"dropout_seed": ints(1, 2)}, ValueError, "dropout_seed: shape (2,), needs () or (1,)"),
    (dense, {"dropout_seed": ints([1])}, ValueError, "dropout_seed: shape (1, 1), needs () or (1,)"),
    (dense, {"dropout_seed": -1}, ValueError, "dropout_seed: -1, needs at least 0"),
    (dense, {"dropout_seed": 2**64}, ValueError, "dropout_seed: 18446744073709551616, needs at most "),
    (dense, {"return_lse": None}, TypeError, "return_lse: got NoneType, needs True or False"),
    (kvcache, {"rotary_interleaved": None}, TypeError, "rotary_interleaved: got NoneType, needs True or False"),
    # the result
    (dense, {"out": [0.0]}, TypeError, "out: "),
    (dense, {"out": zeros(2, 5, 4, 16)}, ValueError,
     "out: shape (2, 5, 4, 16), needs (2, 5, 4, 8): the result's shape"),
    (dense, {"out": zeros(2, 5, 4, 8, dtype=np.float16)}, TypeError, "out: dtype float16, needs float32"),
    (dense, {"out": read_only(2, 5, 4, 8)}, BufferError, "out: "),
    (dense, {"out": np.lib.stride_tricks.as_strided(zeros(32), (2, 5, 4, 8), (0, 0, 32, 4))}, ValueError,
     "out: dimension 0 has stride 0, so that its elements share memory that would be written"),
    (dense, {"out": np.lib.stride_tricks.as_strided(zeros(400), (2, 5, 4, 8), (640, 128, 28, 4))}, ValueError,
     "out: shape (2, 5, 4, 8) with strides (160, 32, 7, 1) lets elements overlap, needs a place in memory for each"),
    (dense, {"v": zeros(2, 7, 2, 16), "out": Q}, ValueError, "out: shares memory with q, needs memory of its own"),
    (dense, {"qv": (QV := zeros(2, 5, 4, 8)), "out": QV}, ValueError, "out: shares memory with qv, needs memory"),
    (dense, {"v": zeros(2, 7, 2, 16), "q": (LONGER := zeros(2, 6, 4, 16))[:, :5], "out": LONGER[:, 1:]}, ValueError,
     "out: shares memory with q, needs memory of its own"),
    (dense, {"v": zeros(2, 7, 2, 16), "q": LONGER[:, 1:], "out": LONGER[:, 5:0:-1]}, ValueError, "out: shares memory"),
    (append, {"v": (NEW := zeros(2, 10, 2, 8))[:, 7:], "out": NEW.reshape(2, 5, 4, 8)}, ValueError,
     "out: shares memory with v, needs memory of its own"),
    (append, {"k": (NEW := zeros(2, 5, 2, 16))[:, :3], "out": NEW.reshape(2, 5, 4, 8)}, ValueError,
     "out: shares memory with k, needs memory of its own"),
    (dense, {"k": (KV := zeros(2, 7, 2, 24))[..., :16], "v": KV[..., 16:],
             "out": KV.reshape(-1)[:320].reshape(2, 5, 4, 8)}, ValueError, "out: shares memory with k, needs memory"),
    (combine, {"out_partial": (PARTS := zeros(3, 2, 5, 4, 8)), "out": PARTS[1]}, ValueError,
     "out: shares memory with out_partial, needs memory of its own"),
    (dense, {"out_dtype": "float16"}, TypeError, "out_dtype: float16, needs float32"),
    (fp8, {"out_dtype": "float32"}, TypeError, "out_dtype: float32, needs bfloat16 or float16"),
    (fp8, {"q": Q.astype(np.float16), "out_dtype": "float32"}, TypeError,
     "out_dtype: float32, needs float16 or bfloat16"),
    (fp8, {"q": Q.astype(BF16), "out_dtype": "float32"}, TypeError, "out_dtype: float32, needs bfloat16 or float16"),
    (dense, {"out_dtype": 5}, TypeError, "out_dtype: expected the name of a dtype or a dtype object, got 5"),
    (dense, {"dtype": ("f2", (1, 2, 3, "x"))}, TypeError, "dtype: expected the name of a dtype or a dtype object, got"),
    (fp8, {"out": zeros(2, 5, 4, 8)}, TypeError, "out: dtype float32, needs bfloat16 or float16"),
    (fp8, {"out": zeros(2, 5, 4, 8, dtype=BF16), "out_dtype": "float16"}, TypeError,
     "out: dtype bfloat16, needs float16"),
    # a cache
    (kvcache, {"k_cache": zeros(3, 7, 2, 16), "v_cache": zeros(3, 7, 2, 8)}, ValueError,
     "k_cache: batch 3, but q has 2; pages need a page_table, chosen entries a cache_batch_idx"),
    (kvcache, {"q": zeros(10, 4, 16), "cu_seqlens_q": ints(0, 10)}, ValueError,
     "k_cache: batch 2, but cu_seqlens_q has 1"),
    (kvcache, {"v_cache": zeros(2, 8, 2, 8)}, ValueError, "v_cache: seqlen_k 8, but k_cache has 7"),
    (kvcache, {"cache_seqlens": -1}, ValueError, "cache_seqlens: -1, needs at least 0"),
    (kvcache, {"cache_seqlens": 8}, ValueError, "cache_seqlens: 8, needs at most 7, the rows of k_cache"),
    (kvcache, {"cache_seqlens": ints(1, 2, 3)}, ValueError, "cache_seqlens: shape (3,), needs (2,): (batch,)"),
    (kvcache, {"cache_seqlens": 1.5}, TypeError, "cache_seqlens: "),
    (kvcache, {"cache_batch_idx": ints(0)}, ValueError, "cache_batch_idx: shape (1,), needs (2,): (batch,)"),
    (kvcache, {"cache_leftpad": ints(0)}, ValueError, "cache_leftpad: shape (1,), needs (2,): (batch,)"),
    (kvcache, {"scheduler_metadata": ints(0)}, ValueError, "scheduler_metadata: shape (1,), needs (16,)"),
    (kvcache, {"scheduler_metadata": np.zeros(16)}, TypeError, "scheduler_metadata: dtype float64, needs int32"),
    (append, {"v": None}, ValueError, "v: got None, but k is given and needs it"),
    (append, {"k": None}, ValueError, "k: got None, but v is given and needs it"),
    (append, {"cache_seqlens": None}, ValueError, "cache_seqlens: got None, but k is given and needs it"),
    (append, {"cache_seqlens": 5}, ValueError,
     "cache_seqlens: 5, needs at most 4, the rows of k_cache less those of k"),
    (append, {"cache_seqlens": 0, "k": zeros(2, 9, 2, 16), "v": zeros(2, 9, 2, 8)}, ValueError,
     "k: seqlen_k_new 9, needs at most 7, the rows of k_cache"),
    (append, {"k": zeros(3, 2, 16)}, ValueError,
     "k: 3 dimensions, needs 4: (batch, seqlen_k_new, num_heads_kv, head_dim)"),
    (append, {"k": zeros(1, 3, 2, 16)}, ValueError, "k: batch 1, but q has 2"),
    (append, {"k": zeros(2, 3, 1, 16)}, ValueError, "k: num_heads_kv 1, but k_cache has 2"),
    (append, {"k": zeros(2, 3, 2, 8)}, ValueError, "k: head_dim 8, but k_cache has 16"),
    (append, {"v": zeros(2, 3, 2, 16)}, ValueError, "v: head_dim 16, but v_cache has 8"),
    (append, {"v": zeros(2, 2, 2, 8)}, ValueError, "v: shape (2, 2, 2, 8), needs (2, 3, 2, 8), as k's (2, 3, 2, 16)"),
    (append, {"cu_seqlens_k_new": ints(0, 2)}, ValueError,
     "cu_seqlens_k_new: shape (2,), needs (3,): (batch + 1,)"),
    (append, {"cu_seqlens_k_new": ints(0, 2, 3)}, ValueError, "k: 4 dimensions, needs 3: (total_k_new, "),
    (append, {"k_cache": read_only(2, 7, 2, 16)}, BufferError, "k_cache: "),
    (append, {"v_cache": read_only(2, 7, 2, 8)}, BufferError, "v_cache: "),
    (append, {"k_cache": np.lib.stride_tricks.as_strided(zeros(7, 2, 16), (2, 7, 2, 16), (0, 128, 64, 4))}, ValueError,
     "k_cache: dimension 0 has stride 0, so that its elements share memory that would be written"),
    (append, {"v_cache": np.lib.stride_tricks.as_strided(zeros(200), (2, 7, 2, 8), (448, 64, 28, 4))}, ValueError,
     "v_cache: shape (2, 7, 2, 8) with strides (112, 16, 7, 1) lets elements overlap, needs a place"),
    (kvcache, {"cu_seqlens_k_new": ints(0, 2, 3)}, ValueError,
     "k: got None, but cu_seqlens_k_new is given and needs it"),
    (rotary, {"k": None, "v": None}, ValueError, "k: got None, but rotary_cos is given and needs it"),
    (rotary, {"rotary_sin": None}, ValueError, "rotary_sin: got None, but rotary_cos is given and needs it"),
    (rotary, {"rotary_cos": None}, ValueError, "rotary_cos: got None, but rotary_sin is given and needs it"),
    (append, {"rotary_seqlens": ints(0, 0)}, ValueError,
     "rotary_cos: got None, but rotary_seqlens is given and needs it"),
    (rotary, {"rotary_seqlens": ints(0)}, ValueError, "rotary_seqlens: shape (1,), needs (2,): (batch,)"),
    (rotary, {"rotary_cos": zeros(128)}, ValueError,
     "rotary_cos: 1 dimensions, needs 2: (seqlen_rotary, rotary_dim / 2)"),
    (rotary, {"rotary_cos": zeros(16, 4)}, ValueError,
     "rotary_cos: rotary_dim 8, needs a multiple of 16 from 16 to q's head_dim 16"),
    (rotary, {"rotary_cos": zeros(16, 16)}, ValueError,
     "rotary_cos: rotary_dim 32, needs a multiple of 16 from 16 to q's head_dim 16"),
    (rotary, {"rotary_sin": zeros(17, 8)}, ValueError, "rotary_sin: shape (17, 8), needs (16, 8): as rotary_cos"),
    # pages
    (paged, {"page_table": ints(0, 1)}, ValueError, "page_table: 1 dimensions, needs 2: (batch, max_pages)"),
    (paged, {"page_table": ints([0, 1])}, ValueError, "page_table: batch 1, but q has 2"),
    (paged, {"k_cache": zeros(6, 0, 2, 16), "v_cache": zeros(6, 0, 2, 8)}, ValueError,
     "k_cache: page_size 0, needs at least 1"),
    (paged, {"v_cache": zeros(5, 4, 2, 8)}, ValueError, "v_cache: num_pages 5, but k_cache has 6"),
    (paged, {"v_cache": zeros(6, 3, 2, 8)}, ValueError, "v_cache: page_size 3, but k_cache has 4"),
    (paged, {"k_cache": zeros(6, 3, 5, 16), "v_cache": zeros(6, 3, 5, 8)}, ValueError,
     "k_cache: num_heads_kv 5, needs a divisor of q's num_heads 4: (num_pages, page_size, num_heads_kv, head_dim)"),
    (paged, {"cache_batch_idx": ints(0, 1)}, ValueError,
     "cache_batch_idx: given, but page_table is too, and needs it to be None"),
    # parts to combine
    (combine, {"out_partial": zeros(3, 5, 4, 8)}, ValueError,
     "out_partial: 4 dimensions, needs 5: (splits, batch, seqlen_q, num_heads, head_dim_v)"),
    (combine, {"lse_partial": zeros(3, 2, 4, 5)}, ValueError,
     "lse_partial: shape (3, 2, 4, 5), needs (3, 2, 5, 4): (splits, batch, seqlen_q, num_heads)"),
    (combine, {"out_partial": zeros(0, 2, 5, 4, 8), "lse_partial": zeros(0, 2, 5, 4)}, ValueError,
     "out_partial: splits 0, needs at least 1"),
    # gradients
    (backward, {"dout": 1.0}, TypeError, "dout: "),
    (backward, {"dout": zeros(2, 5, 4, 16)}, ValueError,
     "dout: shape (2, 5, 4, 16), needs (2, 5, 4, 8): q's shape with head_dim_v"),
    (backward, {"dout": zeros(2, 5, 4, 8, dtype=np.float16)}, TypeError, "dout: dtype float16, but q has float32"),
    (backward, {"out": zeros(2, 5, 4, 8, dtype=BF16)}, TypeError, "out: dtype bfloat16, but q has float32"),
    (backward, {"out": zeros(2, 5, 8, 4)}, ValueError, "out: shape (2, 5, 8, 4), needs (2, 5, 4, 8)"),
    (backward, {"out": None}, TypeError, "out: "),
    (backward, {"lse": zeros(2, 5, 4)}, ValueError,
     "lse: shape (2, 5, 4), needs (2, 4, 5): (batch, num_heads, seqlen_q)"),
    (backward, {"lse": np.zeros((2, 4, 5))}, TypeError, "lse: dtype float64, needs float32"),
    (backward, {"lse": None}, TypeError, "lse: "),
    (backward, {"dlse": zeros(4, 10)}, ValueError, "dlse: shape (4, 10), needs (2, 4, 5)"),
    (backward, {"dlse": np.zeros((2, 4, 5))}, TypeError, "dlse: dtype float64, needs float32"),
    (backward, {"q": Q.astype(FP8), "k": K.astype(FP8), "v": V.astype(FP8)}, TypeError,
     "q: dtype float8_e4m3fn, needs float16 or bfloat16 or float32 or float64"),
    (backward, {"k": zeros(2, 7, 2, 24)}, ValueError, "k: head_dim 24, but q has 16"),
    (backward, {"deterministic": None}, TypeError, "deterministic: got NoneType, needs True or False"),
    (backward, {"softcap": -1.0}, ValueError, "softcap: -1.0, needs at least 0"),
    (backward, {"sm_margin": -1}, ValueError, "sm_margin: -1, needs at least 0"),
    (backward, {"sinks": zeros(2)}, ValueError, "sinks: shape (2,), needs (4,): (num_heads,)"),
    (backward, {"dropout_p": 0.5}, ValueError, "dropout_seed: got None, but dropout_p is 0.5 and needs one"),
    (backward, {"dq": [0.0]}, TypeError, "dq: "),
    (backward, {"dq": zeros(2, 5, 4, 8)}, ValueError, "dq: shape (2, 5, 4, 8), needs (2, 5, 4, 16): q's shape"),
    (backward, {"dk": zeros(2, 7, 4, 16)}, ValueError, "dk: shape (2, 7, 4, 16), needs (2, 7, 2, 16): k's shape"),
    (backward, {"dv": zeros(2, 7, 2, 16)}, ValueError, "dv: shape (2, 7, 2, 16), needs (2, 7, 2, 8): v's shape"),
    (backward, {"dk": zeros(2, 7, 2, 16, dtype=np.float16)}, TypeError, "dk: dtype float16, needs float32"),
    (backward, {"dv": read_only(2, 7, 2, 8)}, BufferError, "dv: "),
    (backward, {"dk": np.broadcast_to(zeros(2, 7, 1, 16), (2, 7, 2, 16))}, BufferError, "dk: "),
    (backward, {"dk": np.lib.stride_tricks.as_strided(zeros(400), (2, 7, 2, 16), (896, 128, 60, 4))}, ValueError,
     "dk: shape (2, 7, 2, 16) with strides (224, 32, 15, 1) lets elements overlap, needs a place in memory for each"),
    (backward, {"dq": Q}, ValueError, "dq: shares memory with q, needs memory of its own"),
    (backward, {"dk": K}, ValueError, "dk: shares memory with k, needs memory of its own"),
    (backward, {"v": K, "dv": K, "dout": Q, "out": Q.copy()}, ValueError, "dv: shares memory with k, needs memory"),
    (backward, {"v": K, "dq": (SAME := zeros(2, 5, 4, 16)), "dout": SAME, "out": Q}, ValueError,
     "dq: shares memory with dout, needs memory of its own"),
    (backward, {"v": K, "dq": SAME, "out": SAME, "dout": Q}, ValueError, "dq: shares memory with out, needs memory"),
    (backward, {"v": K.copy(), "dout": Q, "out": Q, "dk": (BOTH := zeros(2, 7, 2, 16)), "dv": BOTH}, ValueError,
     "dv: shares memory with dk, needs memory of its own"),
    (backward, {"v": K.copy(), "dout": Q, "out": Q, "dk": (BOTH := zeros(2, 8, 2, 16))[:, :7], "dv": BOTH[:, 1:]},
     ValueError, "dv: shares memory with dk, needs memory of its own"),
    (backward, {"lse": (MORE := zeros(2, 5, 4, 16)).reshape(-1)[600:].reshape(2, 4, 5), "dq": MORE}, ValueError,
     "dq: shares memory with lse, needs memory of its own"),
    (varlen_backward, {"lse": zeros(10, 4)}, ValueError, "lse: shape (10, 4), needs (4, 10): (num_heads, total_q)"),
    (varlen_backward, {"dout": zeros(2, 5, 4, 8)}, ValueError, "dout: shape (2, 5, 4, 8), needs (10, 4, 8)"),
    (varlen_backward, {"cu_seqlens_k": None}, ValueError, "cu_seqlens_k: got None, needs int32 (batch + 1,)"),
    (varlen_backward, {"cu_seqlens_k": ints(0, 14)}, ValueError, "cu_seqlens_k: shape (2,), needs (3,): (batch + 1,)"),
    (varlen_backward, {"cu_seqlens_q": None}, TypeError, "cu_seqlens_q: "),
    (varlen_backward, {"max_seqlen_q": -1}, ValueError, "max_seqlen_q: -1, needs at least 0"),
    (combine, {"out_dtype": "float64"}, TypeError, "out_dtype: float64, needs float32 or float16 or bfloat16"),
    (combine, {"out": zeros(2, 5, 4, 16)}, ValueError, "out: shape (2, 5, 4, 16), needs (2, 5, 4, 8)"),
]

# What only the values in memory tell; the CPU can look.
RAGGED = (varlen, narrow, pages)
VALUES = [
    (varlen, {"cu_seqlens_q": ints(1, 5, 10)}, "cu_seqlens_q"),
    (varlen, {"cu_seqlens_q": ints(0, 6, 5)}, "cu_seqlens_q"),
    (varlen, {"cu_seqlens_k": ints(0, 7, 15)}, "cu_seqlens_k"),
    (varlen, {"max_seqlen_q": 4}, "max_seqlen_q"),
    (varlen, {"q": zeros(0, 4, 16), "cu_seqlens_q": ints(0, 5, 10)}, "cu_seqlens_q"),
    (varlen, {"q": zeros(0, 4, 16), "cu_seqlens_q": ints(0, 0, 0), "cu_seqlens_k": ints(3, 7, 99)}, "cu_seqlens_k"),
    (varlen, {"q": zeros(10, 0, 16), "cu_seqlens_k": ints(3, 7, 99)}, "cu_seqlens_k"),
    (narrow, {"cu_seqlens_q": ints(0, 6, 5)}, "cu_seqlens_q"),
    (narrow, {"q": zeros(10, 0, 16, dtype=np.float16), "cu_seqlens_q": ints(0, 6, 5)}, "cu_seqlens_q"),
    (pages, {"max_seqlen_k": 6}, "max_seqlen_k"),
    (dense, {"seqused_q": ints(6, 0)}, "seqused_q"),
    (dense, {"seqused_k": ints(0, -1)}, "seqused_k"),
    (kvcache, {"cache_seqlens": ints(8, 0)}, "cache_seqlens"),
    (append, {"k": zeros(2, 9, 2, 16), "v": zeros(2, 9, 2, 8)}, "k"),
    (kvcache, {"cache_batch_idx": ints(0, 2)}, "cache_batch_idx"),
    (kvcache, {"cache_leftpad": ints(0, 8)}, "cache_leftpad"),
    (append, {"cache_seqlens": ints(5, 0)}, "cache_seqlens"),
    (rotary, {"rotary_seqlens": ints(0, 14)}, "rotary_cos"),
    (paged, {"page_table": ints([0, 6], [1, 2])}, "page_table"),
    (backward, {"seqused_q": ints(6, 0)}, "seqused_q"),
    (backward, {"seqused_k": ints(0, -1)}, "seqused_k"),
    (varlen_backward, {"cu_seqlens_q": ints(0, 6, 5)}, "cu_seqlens_q"),
    (varlen_backward, {"cu_seqlens_k": ints(0, 7, 15)}, "cu_seqlens_k"),
    (varlen_backward, {"max_seqlen_k": 6}, "max_seqlen_k"),
]


def rule_id(value):
    return value.__name__ if callable(value) and not isinstance(value, type) else \
        "-".join(value) if isinstance(value, dict) else None


@pytest.mark.parametrize("call", CALLS)
def test_unbroken_call_works(call):
    call()


@pytest.mark.parametrize(("call", "changes", "error", "message"), RULES, ids=rule_id)
def test_rule(call, changes, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call(**changes)
    assert caught.type is error


@pytest.mark.parametrize(("call", "changes", "name"), VALUES, ids=rule_id)
def test_value_rule_on_the_cpu(call, changes, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(**changes)


@pytest.mark.parametrize(("call", "changes", "name"), VALUES, ids=rule_id)
def test_nothing_is_written_before_the_last_check(call, changes, name):
    if call in (backward, varlen_backward):
        rows_q, rows_k = ((2, 5), (2, 7)) if call is backward else ((10,), (14,))
        shapes = {"dq": (*rows_q, 4, 16), "dk": (*rows_k, 2, 16), "dv": (*rows_k, 2, 8)}
        gradients = {name: np.full(shape, 3, np.float32) for name, shape in shapes.items()}
        with pytest.raises(ValueError):
            call(**gradients, **changes)
        assert all((x == 3).all() for x in gradients.values())
        return
    k_cache, v_cache = np.full_like(K, 3), np.full_like(V, 3)
    rows_and_heads = changes["q"].shape[:-1] if "q" in changes else (2, 5, 4) if call not in RAGGED else (10, 4)
    out = np.full((*rows_and_heads, 8), 3, np.float16 if call is narrow else np.float32)
    if call in (kvcache, append, rotary):
        changes = {"k_cache": k_cache, "v_cache": v_cache, **changes}
    with pytest.raises(ValueError):
        call(out=out, **changes)
    assert (out == 3).all() and (k_cache == 3).all() and (v_cache == 3).all()


@pytest.mark.parametrize("changes", [
    {"softmax_scale": np.float32(0.5)}, {"softmax_scale": 1}, {"causal": np.True_}, {"causal": 1},
    {"window_size": [np.int64(3), 2**40 // 2**12]}, {"attention_chunk": np.int32(4)}, {"dropout_seed": 7},
    {"window_size": (2**31 - 1, 0)}, {"attention_chunk": 2**31 - 1}, {"out_dtype": np.float32},
    {"out_dtype": np.dtype("float32")}, {"out_dtype": np.str_("float32")}, {"dtype": Named.SINGLE}, {"stream": None},
])
def test_numbers_of_other_types_are_taken(changes):
    dense(**changes)


@pytest.mark.parametrize("framework", frameworks.ALL)
def test_scheduler_metadata(framework):
    """Made from the lengths, of a size that is promised, and taken again; nothing depends on it."""
    lengths = framework.put(np.array([3, 0, 7], np.int32))[0]
    metadata = fa3.get_scheduler_metadata(3, 1, 7, 4, 2, 64, lengths)
    assert type(metadata) is type(lengths) and framework.numpy(metadata).shape == (16,)
    q, cache = (framework.put(np.ones((3, rows, 2, 64), np.float16))[0] for rows in (1, 7))
    outs = [framework.numpy(fa3.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, scheduler_metadata=m))
            for m in (None, metadata)]
    assert outs[0].tobytes() == outs[1].tobytes()


METADATA = {"batch_size": 3, "max_seqlen_q": 1, "max_seqlen_k": 7, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64,
            "cache_seqlens": ints(3, 0, 7)}


def test_scheduler_metadata_takes_the_names_of_flashattention():
    more = {"qkv_dtype": BF16, "headdim_v": 64, "cu_seqlens_q": ints(0, 1, 2, 3), "cu_seqlens_k_new": None,
            "cache_leftpad": ints(0, 0, 0), "page_size": 16, "max_seqlen_k_new": 1, "causal": True,
            "window_size": (-1, -1), "attention_chunk": 0, "has_softcap": False, "num_splits": 0, "pack_gqa": None,
            "sm_margin": 0}
    for given in (METADATA, METADATA | more):
        metadata = fa3.get_scheduler_metadata(**given)
        assert metadata.shape == (16,) and metadata.dtype == np.int32


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"batch_size": 2}, ValueError, "cache_seqlens: shape (3,), needs (2,): (batch_size,)"),
    ({"batch_size": "3"}, TypeError, "batch_size: "),
    ({"cache_seqlens": np.zeros(3, np.int64)}, TypeError, "cache_seqlens: dtype int64, needs int32"),
    ({"cache_seqlens": 3}, TypeError, "cache_seqlens: expected an array"),
    ({"max_seqlen_q": "a"}, TypeError, "max_seqlen_q: got str, needs an int"),
    ({"max_seqlen_k": None}, TypeError, "max_seqlen_k: got NoneType, needs an int"),
    ({"num_heads_q": -1}, ValueError, "num_heads_q: -1, needs at least 0"),
    ({"num_heads_kv": 0}, ValueError, "num_heads_kv: 0, needs at least 1"),
    ({"headdim": 0}, ValueError, "headdim: 0, needs at least 1"),
    ({"headdim_v": 0}, ValueError, "headdim_v: 0, needs at least 1"),
    ({"page_size": 0}, ValueError, "page_size: 0, needs at least 1"),
    ({"max_seqlen_k_new": -1}, ValueError, "max_seqlen_k_new: -1, needs at least 0"),
    ({"causal": "yes"}, TypeError, "causal: got str"), ({"has_softcap": 1.5}, TypeError, "has_softcap: got float"),
    ({"window_size": "zz"}, TypeError, "window_size[0]: got str"),
    ({"attention_chunk": -1}, ValueError, "attention_chunk: -1"), ({"num_splits": -1}, ValueError, "num_splits: -1"),
    ({"pack_gqa": 3}, TypeError, "pack_gqa: got int"), ({"sm_margin": 0.5}, TypeError, "sm_margin: got float"),
])
def test_scheduler_metadata_of_what_does_not_fit(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fa3.get_scheduler_metadata(**METADATA | changes)


# Status codes.

@pytest.mark.parametrize(("code", "error"), [
    (-1, ValueError), (-2, ValueError), (-3, ValueError), (-4, TypeError), (-5, ValueError), (-6, ValueError),
    *((code, NotImplementedError) for code in range(-10, -18, -1)), (-99, RuntimeError)])
def test_status_codes(code, error):
    with pytest.raises(error, match=r"^k: head_dim 96, but q has 128$") as caught:
        raise_status(code, "shape", "k: head_dim 96, but q has 128")
    assert caught.type is error
    with pytest.raises(error, match=r"^shape$"):
        raise_status(code, "shape", "")


def test_status_ok():
    assert raise_status(0, "ok", "") is None


def test_cuda_error_has_its_code():
    with pytest.raises(fa3.CudaError, match=r"^CUDA error: no device$") as caught:
        raise_status(-100, "CUDA error", "no device", 100)
    assert caught.value.code == 100 and isinstance(caught.value, RuntimeError)
    assert pickle.loads(pickle.dumps(caught.value)).code == 100
