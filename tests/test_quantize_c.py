"""fa3_quantize_fp8 past Python's checks: its own refuse the same things, by status code and sentence."""

import ctypes
import re
from pathlib import Path

import pytest
from conftest import missing_gpu
from quantize_params import Params, params

import fa3

ENDS = 4096  # an address: nothing is read before the checks are through


@pytest.fixture(scope="module")
def library():
    found = ctypes.CDLL(fa3.get_library())
    found.fa3_last_error.restype = ctypes.c_char_p
    return found


def call(**changes):
    filled = params((2, 10, 4, 64), "float16", "head", False, x=4096, out=4096, descale=4096,
                    x_strides=(2560, 256, 64, 1), out_strides=(2560, 256, 64, 1), descale_strides=(1,))
    for name, value in changes.items():
        target, _, field = name.partition("__")
        if field == "last":
            getattr(filled, target).stride[3] = value
        elif field:
            setattr(getattr(filled, target), field, value)
        else:
            setattr(filled, name, value)
    return filled


@pytest.mark.parametrize(("changes", "status", "words"), [
    ({"struct_size": 0}, -5, "struct_size: 0, but this library's fa3_quantize_params has "),
    ({"dtype": 3}, -4, "dtype: 3 is no fa3_dtype that x can have"),
    ({"granularity": 3}, -5, "granularity: 3"), ({"granularity": -1}, -5, "granularity: -1"),
    ({"cu_seqlens": ENDS}, -5, "cu_seqlens: given, but only FA3_PER_BATCH_HEAD"),
    ({"batch": -1}, -5, "batch: -1 is negative"), ({"rows": -1}, -5, "rows: -1 is negative"),
    ({"num_heads": -1}, -5, "num_heads: -1 is negative"),
    ({"head_dim": 0}, -2, "head_dim: 0"), ({"head_dim": 12}, -2, "head_dim: 12"), ({"head_dim": 584}, -2, "584"),
    ({"head_dim": -8}, -2, "head_dim: -8"),
    ({"rows": 2**30}, -5, "x: 2 x 1073741824 x 4 rows"), ({"batch": 2**29, "rows": 1}, -5, "fewer than 2^31"),
    ({"granularity": 2, "cu_seqlens": ENDS, "batch": 2**30}, -5, "descale: 4294967296 scales, but at most 2^30"),
    ({"granularity": 2, "cu_seqlens": ENDS, "batch": 2**28 + 1}, -5, "descale: 1073741828 scales"),
    ({"rows": 0, "num_heads": 2**30 + 1}, -5, "descale: 1073741825 scales"),
    ({"x__data": None}, -1, "x: null data"), ({"out__data": None}, -1, "out: null data"),
    ({"descale": None}, -1, "descale: null pointer"),
    ({"x__data": 4097}, -5, "x: its address is not a multiple of 2 bytes"),
    ({"x__data": 4098, "dtype": 4}, -5, "x: its address is not a multiple of 4 bytes"),
    ({"descale": 4098}, -5, "descale: its address is not a multiple of 4 bytes"),
    ({"cu_seqlens": ENDS + 2, "granularity": 2}, -5, "cu_seqlens: its address is not a multiple of 4 bytes"),
    ({"x__last": 2}, -5, "x: stride 2 along head_dim"), ({"out__last": -1}, -5, "out: stride -1 along head_dim"),
])
def test_refused(library, changes, status, words):
    filled, nbytes = call(**changes), ctypes.c_size_t(1)
    assert library.fa3_quantize_workspace(ctypes.byref(filled), ctypes.byref(nbytes)) == status
    assert nbytes.value == 0 and words in library.fa3_last_error().decode()
    assert library.fa3_quantize_fp8(ctypes.byref(filled), None, None) == status
    assert words in library.fa3_last_error().decode() and library.fa3_last_cuda_error() == 0


def test_a_workspace_off_its_alignment_is_refused(library):
    assert library.fa3_quantize_fp8(ctypes.byref(call()), ctypes.c_void_p(4096 + 8), None) == -5
    assert b"workspace: its address is not a multiple of 16 bytes" in library.fa3_last_error()


def test_null(library):
    nbytes = ctypes.c_size_t(1)
    assert library.fa3_quantize_fp8(None, None, None) == -1 and b"params" in library.fa3_last_error()
    assert library.fa3_quantize_workspace(ctypes.byref(call()), None) == -1 and b"bytes" in library.fa3_last_error()
    assert library.fa3_quantize_workspace(None, ctypes.byref(nbytes)) == -1 and nbytes.value == 0


@pytest.mark.parametrize("changes", [{"num_heads": 0}, {"granularity": 2, "batch": 0}])
def test_no_scales(library, changes):
    """Nothing to write: no device is needed."""
    filled, nbytes = call(x__data=None, out__data=None, descale=None, **changes), ctypes.c_size_t(1)
    assert library.fa3_quantize_workspace(ctypes.byref(filled), ctypes.byref(nbytes)) == 0 == nbytes.value
    assert library.fa3_quantize_fp8(ctypes.byref(filled), None, None) == 0


def test_without_a_device(library):
    if missing_gpu() != "no CUDA device":
        pytest.skip("a CUDA device is here")
    filled, nbytes = call(), ctypes.c_size_t(1)
    assert library.fa3_quantize_fp8(ctypes.byref(filled), None, None) == -100
    assert library.fa3_last_cuda_error() != 0
    assert library.fa3_quantize_workspace(ctypes.byref(filled), ctypes.byref(nbytes)) == -100 and nbytes.value == 0


@pytest.mark.gpu
def test_workspace_is_asked_for(library):
    filled, nbytes = call(rows=10**6), ctypes.c_size_t()
    assert library.fa3_quantize_workspace(ctypes.byref(filled), ctypes.byref(nbytes)) == 0 and nbytes.value % 256 == 0
    assert nbytes.value > 0 and library.fa3_quantize_fp8(ctypes.byref(filled), None, None) == -7


def test_the_tests_know_every_field():
    header = re.sub(r"/\*.*?\*/", "", Path(fa3.get_include(), "fa3.h").read_text(), flags=re.DOTALL)
    body = re.search(r"typedef struct fa3_quantize_params {(.*?)}", header, re.DOTALL)[1]
    fields = re.findall(r"(\w+)(?:\[\d+\])?(?=[,;])", body)
    assert fields == [name for name, _ in Params._fields_]
