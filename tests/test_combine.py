"""flash_attn_combine against the formula in float64: on every backend, and its kernel on an emulated GPU."""

import ctypes

import frameworks
import numpy as np
import pytest
from compilers import HERE, SRC, host_library
from conftest import missing_gpu
from forward_params import DTYPES as CODES
from forward_params import address, ints, set_rows, structure
from hypothesis import example, given
from hypothesis import strategies as st
from quantize_params import Array
from strategies import DTYPES, place

import fa3

Params = structure(
    "Params", struct_size=ctypes.c_size_t, **ints("device", "out_dtype", "splits", "batch", "rows", "num_heads",
                                                  "head_dim_v"),
    out_partial=Array, lse_partial=Array, out_partial_step=ctypes.c_int64, lse_partial_step=ctypes.c_int64,
    out=Array, lse=Array)
ROUNDING = {"float32": 2.0**-20, "float16": 2.0**-11, "bfloat16": 2.0**-8}
splits_of = st.integers(1, 9) | st.sampled_from([16, 17])
sizes = st.tuples(*(st.integers(0, 3) | st.integers(1, 3) for _ in range(3)), st.sampled_from([8, 1, 3, 64, 80, 0]))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp("host"), "combine",
                           [HERE / "host" / "combine.cpp", SRC / "combine_plan.cpp"], f"-I{HERE / 'host' / 'gpu'}",
                           "-fno-extern-tls-init", "-Wno-unknown-pragmas", sanitize=False)
    library.params_size.restype = ctypes.c_size_t
    assert library.params_size() == ctypes.sizeof(Params)
    return library


def parts(splits, shape, seed, placement, empty):
    """(out_partial, its buffer, lse_partial): parts of `empty` saw nothing, and hold NaN."""
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((splits, *shape)).astype(np.float32)
    lse = (rng.standard_normal((splits, *shape[:3])) * 10).astype(np.float32)
    nothing = rng.uniform(size=lse.shape) < empty
    lse[nothing] = -np.inf
    out[nothing] = np.nan
    buffer, view = place(out, placement)
    return view, buffer, lse


def joined(out, lse):
    """In float64."""
    out, lse = out.astype(np.float64), lse.astype(np.float64)
    with np.errstate(all="ignore"):
        top = lse.max(axis=0)
        weights = np.where(lse == -np.inf, 0, np.exp(lse - np.where(top == -np.inf, 0, top)))
        total = weights.sum(axis=0)
        summed = (np.where(weights == 0, 0, out.transpose(4, 0, 1, 2, 3)) * weights).sum(axis=1)
        return (summed / np.where(total == 0, 1, total)).transpose(1, 2, 3, 0), np.where(
            total == 0, -np.inf, top + np.log(total))


def assert_joined(found, found_lse, out, lse, dtype):
    expected, expected_lse = joined(out, lse)
    largest = np.nan_to_num(np.abs(out)).max(initial=0)
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=ROUNDING[dtype], atol=1e-6 * largest + 1e-7)
    np.testing.assert_allclose(found_lse, expected_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("framework", frameworks.BACKENDS)
@given(splits_of, sizes, st.sampled_from(sorted(ROUNDING)), st.sampled_from([0, 0.3, 1]),
       st.sampled_from(["contiguous", "sliced", "transposed", "broadcast"]), st.booleans())
def test_parts_are_joined(framework, splits, shape, dtype, empty, placement, written):
    out_partial, buffer, lse_partial = parts(splits, shape, 0, placement, empty)
    given_parts = framework.put(out_partial, buffer)[0], framework.put(lse_partial)[0]
    options = {"out_dtype": dtype}
    if written:
        buffer, view = place(np.zeros(shape, DTYPES[dtype]), "sliced")
        options["out"] = framework.put(view, buffer)[0]
    out, lse = (framework.numpy(x) for x in fa3.flash_attn_combine(*given_parts, **options))
    assert out.dtype == DTYPES[dtype] and lse.dtype == np.float32
    assert_joined(out, lse, out_partial, lse_partial, dtype)


@given(splits_of, sizes.filter(lambda shape: min(shape[:3])), st.sampled_from(sorted(ROUNDING)),
       st.sampled_from([0, 0.3, 1]), st.sampled_from(["contiguous", "sliced", "transposed", "broadcast"]),
       st.sampled_from(["contiguous", "sliced", "transposed"]))
@example(3, (1, 1, 2, 0), "float32", 0, "contiguous", "contiguous")
def test_kernel(host, splits, shape, dtype, empty, placement, placement_out):
    """Nothing is written outside the result."""
    out_partial, _, lse_partial = parts(splits, shape, 1, placement, empty)
    buffer, out = place(np.full(shape, 7, DTYPES[dtype]), placement_out, poison=7)
    lse = np.full((*shape[:3], 2), 7, np.float32)[..., 0]
    p = Params(struct_size=ctypes.sizeof(Params), out_dtype=CODES[dtype], splits=splits)
    p.batch, p.rows, p.num_heads, p.head_dim_v = shape
    p.out_partial_step, p.lse_partial_step = (x.strides[0] // 4 for x in (out_partial, lse_partial))
    for field, array in ((p.out_partial, out_partial[0]), (p.lse_partial, lse_partial[0, ..., None]),
                         (p.out, out), (p.lse, lse[..., None])):
        set_rows(field, array)
    assert address(lse)
    host.combine_emulated(ctypes.byref(p))
    assert_joined(out, lse, out_partial, lse_partial, dtype)
    assert (lse.base[..., 1] == 7).all()
    out[...] = 7
    assert (buffer.astype(np.float32) == 7).all()


@pytest.fixture(scope="module")
def library():
    found = ctypes.CDLL(fa3.get_library())
    found.fa3_last_error.restype = ctypes.c_char_p
    return found


def arguments(shape=(2, 3, 4, 8), **changes):
    """Of a call past Python's checks, whose arrays are an address."""
    p = Params(struct_size=ctypes.sizeof(Params), out_dtype=CODES["float32"], splits=2)
    p.batch, p.rows, p.num_heads, p.head_dim_v = shape
    for name in ("out_partial", "lse_partial", "out", "lse"):
        getattr(p, name).data, getattr(p, name).stride[3] = changes.pop(name, 4096), 1
    for name, value in changes.items():
        setattr(p, name, value)
    return p


TOO_MANY = "has more elements than a grid of threads can take"


@pytest.mark.parametrize(("changes", "words"), [
    ({"shape": (1, 2**30, 1, 4 * 128 + 1)}, TOO_MANY), ({"shape": (2**10, 2**15, 2**12, 4)}, TOO_MANY),
    ({"shape": (2**31 - 1, 2**31 - 1, 2**31 - 1, 2**30)}, TOO_MANY),
    ({"shape": (1, 1, 1, 2**31 - 1)}, "head_dim_v: 2147483647, but at most 2^30"),
    ({"splits": 0}, "splits: 0, but it must be from 1 to 2^30"), ({"splits": 2**30 + 1}, "splits: 1073741825"),
    *(({name: 4098}, f"{name}: its address is not a multiple of 4 bytes")
      for name in ("out_partial", "lse_partial", "out", "lse")),
    ({"out": 4097, "out_dtype": CODES["float16"]}, "out: its address is not a multiple of 2 bytes")], ids=str)
def test_refused_by_the_library(library, changes, words):
    assert library.fa3_combine(ctypes.byref(arguments(**changes)), None) == -5
    assert words in library.fa3_last_error().decode()


@pytest.mark.parametrize("shape", [(1, 2**30, 1, 4 * 127), (2**10, 2**15, 2**12 - 1, 4), (1, 1, 1, 2**30)], ids=str)
def test_a_grid_takes_so_many(library, shape):
    """64 threads a block, 2^31 - 1 blocks: refused is what comes after, on a machine without a GPU."""
    if missing_gpu() != "no CUDA device":
        pytest.skip("a CUDA device is here, which would begin with it")
    assert library.fa3_combine(ctypes.byref(arguments(shape)), None) == -100
