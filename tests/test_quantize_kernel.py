"""The quantisation kernels without a GPU: their source on an emulated one, against the CPU's backend, bit for bit but
for the rotation by tensor cores.

The emulation (tests/host/gpu) runs thread blocks as threads, so that those of a group wait for each other as on a GPU;
asynchronous copies are made as early or as late as they may be.
"""

import csv
import ctypes

import ml_dtypes
import numpy as np
import pytest
from compilers import HERE, SRC, host_library
from hypothesis import given
from hypothesis import strategies as st
from quantize_params import GRANULARITIES, near, params

import fa3

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
POISON = 0x55
GARBAGE = 0x7FF0DEAD7FC00000  # what the workspace holds before: neither zeros nor a ticket
with open(SRC / "resources.csv", newline="") as table:
    REGISTERS = {row["kernel"]: int(row["registers"]) for row in csv.DictReader(table)}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp("host"), "quantize",
                           [HERE / "host" / "quantize.cpp", SRC / "quantize_plan.cpp"], f"-I{HERE / 'host' / 'gpu'}",
                           "-ffp-contract=off",  # the kernel says where it fuses
                           "-fno-extern-tls-init", "-Wno-unknown-pragmas",
                           sanitize=False)  # which would take a minute to compile
    library.quantize_emulated.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_uint64]
    return library


def embedded(shape, dtype, fill, offset=0, padding=0):
    """An array with rows `padding` elements apart, inside a buffer full of `fill`: (array, buffer)."""
    strides, step = [], 1
    for axis, size in reversed(list(enumerate(shape))):
        strides.insert(0, step)
        step = step * size + (padding if axis == len(shape) - 1 else 0)
    buffer = np.full(step + offset + 64, fill, dtype)
    itemsize = buffer.itemsize
    return np.ndarray(shape, dtype, buffer, offset * itemsize, [stride * itemsize for stride in strides]), buffer


def emulate(host, x, granularity, hadamard, *, cu_seqlens=None, places=0, late=True, offset=0, num_sms=1):
    """(codes, descale, blocks to a scale); nothing but these has been written."""
    codes, buffer = embedded(x.shape, np.uint8, POISON, 32 + offset, offset)
    batch = len(x) if x.ndim == 4 else 1 if cu_seqlens is None else len(cu_seqlens) - 1
    scales = (batch, x.shape[-2])[2 - GRANULARITIES.index(granularity):]
    descale, descale_buffer = embedded(scales, np.float32, np.nan, 3)
    call = params(x.shape, x.dtype.name, granularity, hadamard, x=x.__array_interface__["data"][0],
                  out=codes.__array_interface__["data"][0], descale=descale.__array_interface__["data"][0],
                  x_strides=[stride // x.itemsize for stride in x.strides], out_strides=codes.strides,
                  descale_strides=[stride // 4 for stride in descale.strides],
                  cu_seqlens=0 if cu_seqlens is None else cu_seqlens.ctypes.data, batch=batch)
    blocks = host.quantize_emulated(ctypes.byref(call), num_sms, places, late, GARBAGE)
    found = codes.copy(), descale.copy()
    codes[...], descale[...] = POISON, np.nan
    assert (buffer == POISON).all() and np.isnan(descale_buffer).all(), "written outside the result"
    assert blocks > 0, {-1: "written past the workspace", -2: "a part is left for a replay to take for its own"}[blocks]
    return *found, blocks


def same(codes, expected):
    """Equal codes; a NaN has two."""
    expected = np.asarray(expected).view(np.uint8)
    nan = expected & 0x7F == 0x7F
    return ((codes == expected) | (nan & (codes & 0x7F == 0x7F))).all()


@pytest.mark.parametrize("hadamard", [False, True], ids=["plain", "hadamard"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 136, 256, 264, 512, 576])
def test_as_the_cpu(host, head_dim, granularity, hadamard):
    random = np.random.default_rng(head_dim + 1000 * GRANULARITIES.index(granularity) + hadamard)
    shared = 0
    for dtype, late in zip(DTYPES.values(), (False, True, True), strict=True):
        rows = int(random.integers(60, 150)) if head_dim > 24 else 600
        x, _ = embedded((2, rows, 3, head_dim), dtype, np.nan, 8 * (late and hadamard), 8 * late)
        x[...] = random.standard_normal(x.shape)
        if late:
            for value in (np.nan, np.inf, -np.inf, -0.0):
                x[tuple(random.integers(size) for size in x.shape)] = value
        codes, descale, blocks = emulate(host, x, granularity, hadamard, late=late, num_sms=4,
                                         places=int(random.integers(3, 6)) if late and hadamard else 0)
        expected, expected_descale = fa3.quantize_fp8(x, granularity=granularity, hadamard=hadamard)
        strides = [stride // x.itemsize for stride in x.strides]
        if plan(host, x.shape, granularity, x.dtype.name, hadamard, 4, strides)["tile_dim"]:
            assert near(codes, descale, expected, expected_descale)
        else:
            assert (descale == expected_descale).all()
            assert same(codes, expected)
        shared = max(shared, blocks)
    if granularity == "tensor":
        assert shared > 1, "several blocks to a scale, or nothing has waited"


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("granularity", "rows", "num_sms", "streams"), [
    ("head", 700, 12, True), ("batch_head", 250, 4, True), ("batch_head", 63, 2, True), ("batch_head", 65, 4, True),
    ("tensor", 500, 2, False), ("head", 1000, 1, False)])
def test_tiles(host, head_dim, granularity, rows, num_sms, streams):
    """Streams of units that blocks share or have alone, and units that no block can hold; ragged ends, gaps between
    rows, values that are not finite."""
    rows = min(rows, 64000 // head_dim)  # of large ones fewer find no place
    random = np.random.default_rng(head_dim + rows)
    for dtype, late in zip(("float16", "bfloat16"), (True, False), strict=True):
        x, _ = embedded((2, rows, 3, head_dim), DTYPES[dtype], np.nan, 8 * late, 16 * late)
        x[...] = random.standard_normal(x.shape)
        if late:
            for value in (np.nan, np.inf, -np.inf, 6e4):
                x[tuple(random.integers(size) for size in x.shape)] = value
        else:
            x[0, 5] = 3e38  # whose sums are infinite
        strides = [stride // x.itemsize for stride in x.strides]
        found = plan(host, x.shape, granularity, dtype, True, num_sms, strides)
        assert found["tile_dim"] == head_dim and (found["steps"] > 0) == streams
        codes, descale, _ = emulate(host, x, granularity, True, late=late, num_sms=num_sms)
        expected, expected_descale = fa3.quantize_fp8(x, granularity=granularity, hadamard=True)
        assert near(codes, descale, expected, expected_descale)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_infinities_that_cancel_in_a_tile(host, head_dim):
    """They saturate, and only what was put in as NaN is NaN: in its block of the rotation, not in the other."""
    x = np.ones((1, 64, 1, head_dim), np.float16)
    x[0, 3, 0, :2] = np.inf
    x[0, 20, 0, [1, 40]] = np.inf, -np.inf
    x[0, 40, 0, [1, 2, 3]] = np.inf, -np.inf, np.nan
    codes, descale, _ = emulate(host, x, "head", True)
    codes, block = codes[0, :, 0] & 0x7F, 64 if head_dim == 80 else head_dim
    assert (codes[[3, 20], :block] == 0x7E).all() and (codes[40, :block] == 0x7F).all()
    assert (codes == 0x7F).sum() == block
    x[0, [3, 20, 40]] = 1
    np.testing.assert_allclose(descale, fa3.quantize_fp8(x, hadamard=True)[1], rtol=1e-6)


@pytest.mark.parametrize(("rows", "steps"), [(64, 1), (128, 2)])
def test_tiles_of_a_block_alone(host, rows, steps):
    """Nothing is left for other blocks, and there is no workspace to leave it in."""
    x = np.random.default_rng(0).standard_normal((3, rows, 3, 128)).astype(np.float16)
    found = plan(host, x.shape, "batch_head", hadamard=True, num_sms=4)
    assert (found["tile_dim"], found["blocks"], found["steps"], found["workspace"]) == (128, 1, steps, 0)
    codes, descale, _ = emulate(host, x, "batch_head", True, num_sms=4)
    assert near(codes, descale, *fa3.quantize_fp8(x, granularity="batch_head", hadamard=True))


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("hadamard", [False, True])
def test_addresses_and_strides_of_any_alignment(host, offset, hadamard):
    random = np.random.default_rng(offset)
    for dtype in DTYPES.values():
        x, _ = embedded((3, 40, 2, 72), dtype, np.nan, offset, offset)
        x[...] = random.standard_normal(x.shape)
        views = [x, x[::-1], x[:, ::2], x[:, ::-1, ::-1], x.transpose(1, 0, 2, 3), x.transpose(2, 1, 0, 3),
                 np.broadcast_to(x[:1], x.shape), x[1]]
        for view in views:
            for granularity in GRANULARITIES if view.ndim == 4 else GRANULARITIES[:2]:
                codes, descale, _ = emulate(host, view, granularity, hadamard, offset=offset)
                expected, expected_descale = fa3.quantize_fp8(view, granularity=granularity, hadamard=hadamard)
                assert (descale == expected_descale).all() and same(codes, expected)


@pytest.mark.parametrize("ends", [[0, 10, 10, 57, 100], [0, 100], [0, 0, 0], [0, 3, 90]])
def test_sequences(host, ends):
    x = np.random.default_rng(0).standard_normal((100, 2, 64)).astype(np.float16)
    ends = np.array(ends, np.int32)
    codes, descale, _ = emulate(host, x, "batch_head", True, cu_seqlens=ends)
    expected, expected_descale = fa3.quantize_fp8(x, granularity="batch_head", hadamard=True, cu_seqlens=ends)
    assert (descale == expected_descale).all()
    assert same(codes[:ends[-1]], expected[:ends[-1]])
    assert (codes[ends[-1]:] == POISON).all(), "rows of no sequence"


def test_sequences_that_lie(host):
    """The kernel stays inside x and its result whatever cu_seqlens says: a read outside gives NaN, or crashes."""
    x, _ = embedded((100, 2, 64), np.float16, np.inf, 64)
    x[...] = 1
    for ends in ([5, 3, 200], [-7, 2**31 - 1, -2**31], [90, 10, 50], [2**31 - 1, -1, 100]):
        _, descale, _ = emulate(host, x, "batch_head", False, cu_seqlens=np.array(ends, np.int32))
        assert set(np.unique(descale)) <= {np.float32(1), np.float32(1) / np.float32(448)}


def test_sequences_longer_than_the_plan_thought(host):
    """One long among many short: its blocks have more steps than places, and come round all the same."""
    random = np.random.default_rng(0)
    x = random.standard_normal((1000, 1, 128)).astype(np.float16)
    ends = np.array([0, *range(1, 40), 1000], np.int32)
    codes, descale, blocks = emulate(host, x, "batch_head", False, cu_seqlens=ends)
    expected, expected_descale = fa3.quantize_fp8(x, granularity="batch_head", cu_seqlens=ends)
    assert blocks == 1 and (descale == expected_descale).all() and same(codes, expected)


def test_nothing_there(host):
    for shape in ((2, 0, 3, 64), (0, 5, 3, 64), (0, 3, 64)):
        for granularity in GRANULARITIES[:2]:
            _, descale, _ = emulate(host, np.empty(shape, np.float16), granularity, False)
            assert (descale == 1).all() and descale.size == (1 if granularity == "tensor" else 3)


@given(st.one_of(st.integers(1, 2**31 - 1), st.sampled_from([1, 2, 3, 7, 2**16, 2**31 - 1])),
       st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_quotients(host, divisor, numbers):
    n = np.array([*numbers, 0, divisor - 1, divisor, 2**31 - 1], np.uint32)
    n = np.concatenate([n, n[n >= divisor] // np.uint32(divisor) * np.uint32(divisor)])
    n = np.concatenate([n, n[n > 0] - np.uint32(1)])
    out = np.empty_like(n)
    host.quotients(ctypes.c_uint32(divisor), len(n), n.ctypes.data_as(ctypes.c_void_p),
                   out.ctypes.data_as(ctypes.c_void_p))
    assert (out == n // np.uint32(divisor)).all()


def plan(host, shape, granularity, dtype="float16", hadamard=False, num_sms=132, strides=None):
    strides = strides or [int(np.prod(shape[axis + 1:])) for axis in range(4)]
    call = params(shape, dtype, granularity, hadamard, x=4096, out=4096, descale=4096, x_strides=strides,
                  out_strides=strides, descale_strides=[])
    out = (ctypes.c_int64 * 12)()
    host.plan_of(ctypes.byref(call), num_sms, out)
    names = ("groups", "blocks", "places", "workspace", "axes", "shared", "resident", "steps", "tile_dim", "threads",
             "columns", "rows")
    return dict(zip(names, out, strict=True))


def resident(found, hadamard):
    """Blocks of a multiprocessor by what the compiler says of the kernel's registers, and by shared memory."""
    name = f"rotation_{found['tile_dim']}" if found["tile_dim"] else f"{found['columns']}x{found['rows']}"
    name = f"hadamard_{name}" if hadamard and not found["tile_dim"] else name
    name = f"stream_{name}" if found["steps"] and not found["tile_dim"] else name
    warps = found["threads"] // 32
    of_warp = -(-REGISTERS[f"quantize_{name}"] // 8) * 8 * 32
    by_registers = 4 * (2**14 // of_warp) // warps  # each quarter of a multiprocessor has registers of its own
    return min(by_registers, 228 * 1024 // (found["shared"] // found["resident"]), 2048 // found["threads"])


@given(st.tuples(st.integers(1, 100), st.integers(1, 100_000), st.integers(1, 128),
                 st.sampled_from([8, 64, 80, 128, 256, 264, 576])), st.sampled_from(GRANULARITIES),
       st.sampled_from(sorted(DTYPES)), st.booleans(), st.sampled_from([1, 78, 114, 132]))
def test_plans_fit_the_chip(host, shape, granularity, dtype, hadamard, num_sms):
    if shape[0] * shape[1] * shape[2] >= 2**31:
        shape = (1, *shape[1:])
    found = plan(host, shape, granularity, dtype, hadamard, num_sms)
    scales = {"tensor": 1, "head": shape[2], "batch_head": shape[0] * shape[2]}[granularity]
    assert 1 <= found["groups"] <= scales
    assert found["shared"] <= 228 * 1024
    assert found["places"] >= 1
    if found["blocks"] > 1:  # blocks that wait for each other are all resident, or the launch fails
        assert found["groups"] * found["blocks"] <= num_sms * min(found["resident"], resident(found, hadamard))
        assert found["places"] > 3
    parts = 16 * scales * found["blocks"] + 8 * found["groups"]  # each block's for each scale, and a counter a group
    gathered = found["steps"] and not found["tile_dim"]
    assert found["workspace"] == (parts if found["blocks"] > 1 or gathered else 0)
    if found["steps"]:  # a unit is wholly loaded before it is written, and there is room for others
        assert found["steps"] >= found["blocks"]
        assert -(-found["steps"] // found["blocks"]) <= found["places"] - 2


def test_plans_of_known_problems(host):
    assert plan(host, (84, 64, 16, 80), "batch_head")["blocks"] == 1, "10 KiB to a scale"
    found = plan(host, (84, 64, 16, 80), "batch_head", hadamard=True)
    assert (found["blocks"], found["steps"]) == (1, 1) and 112 <= found["groups"] <= 132, "a tile to a scale"
    found = plan(host, (1, 16384, 16, 128), "head")
    assert (found["groups"], found["blocks"], found["steps"]) == (2, 66, 128), "a stream of 8 rounds of 2 heads"
    found = plan(host, (1, 16384, 16, 128), "tensor")
    assert (found["groups"], found["blocks"], found["steps"]) == (1, 132, 0), "more than all blocks can hold"
    found = plan(host, (1, 16384, 16, 128), "head", hadamard=True)
    assert (found["groups"], found["blocks"], found["steps"]) == (2, 66, 256), "two heads at a time"
    found = plan(host, (1, 16384, 16, 128), "tensor", hadamard=True)
    assert (found["groups"], found["blocks"], found["steps"]) == (1, 132, 0), "more than all blocks can hold"


def test_rows_that_no_tile_takes(host):
    """What the kernel that rotates tiles needs: 16 bits, its head dims, rows along one axis at 16 bytes."""
    shape, strides = (1, 4096, 4, 128), [4096 * 512, 512, 128, 1]
    call = dict(granularity="head", hadamard=True)
    assert plan(host, shape, **call)["tile_dim"] == 128
    assert plan(host, shape, **call | {"hadamard": False})["tile_dim"] == 0
    assert plan(host, shape, dtype="float32", **call)["tile_dim"] == 0
    assert plan(host, (1, 4096, 4, 112), **call)["tile_dim"] == 0, "three blocks"
    assert plan(host, (1, 31, 4, 128), **call)["tile_dim"] == 0, "less than half of a tile's rows"
    assert plan(host, shape, strides=[*strides[:1], 520, 130, 1], **call)["tile_dim"] == 0
    assert plan(host, shape, strides=[*strides[:1], 0, 128, 1], **call)["tile_dim"] == 0
    assert plan(host, shape, strides=[*strides[:1], -512, 128, 1], **call)["tile_dim"] == 0, "TMA goes forward"
    assert plan(host, shape, strides=[*strides[:1], 1 << 39, 128, 1], **call)["tile_dim"] == 0, "TMA's strides"
    assert plan(host, (2, 4096, 4, 128), strides=[1 << 30, *strides[1:]], **call)["tile_dim"] == 0, "two axes of rows"


def test_axes_that_are_one(host):
    """Contiguous rows need no quotients, whatever shares a scale."""
    for granularity in GRANULARITIES:
        assert plan(host, (4, 100, 6, 64), granularity)["axes"] == 1
    heads_first = [100 * 6 * 64, 64, 100 * 64, 1]
    assert plan(host, (4, 100, 6, 64), "head", strides=heads_first)["axes"] == 2
    assert plan(host, (4, 100, 6, 64), "tensor", strides=heads_first)["axes"] == 3
    assert plan(host, (1, 100, 6, 64), "head", strides=heads_first)["axes"] == 1
