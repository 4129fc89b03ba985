"""What a warp keeps of its fragments, on the host: the elements that philox.py keeps one by one."""

import ctypes

import numpy as np
import philox
import pytest
from compilers import HERE, host_library
from hypothesis import given
from hypothesis import strategies as st

seeds = st.integers(0, 2**64 - 1)
heads, batches = st.integers(0, 2**20), st.integers(0, 2**31 - 1)
sixteens = st.integers(0, 2**26).map(lambda block: 16 * block)
thresholds = st.sampled_from([0, 1, 6554, 32768, 65535]) | st.integers(0, 65535)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp("dropout"), "dropout", [HERE / "host" / "dropout.cpp"],
                           f"-I{HERE / 'host' / 'lane'}", "-Wno-unknown-pragmas")
    library.seed_in.restype = ctypes.c_uint64
    return library


def kept(seed, threshold, batch, head, queries, keys):
    query, key = np.meshgrid(*(np.array(x, np.uint64) for x in (queries, keys)), indexing="ij")
    return philox.sixteen_bits(seed, np.uint64(batch), np.uint64(head), query, key) >= threshold


def fragment(block):
    """(16, 64) as each lane of a warp holds it: words of two neighbouring columns, (32, 16, 2)."""
    found = np.empty((32, 16, 2), block.dtype)
    for lane in range(32):
        for i in range(16):
            row, column = lane // 4 + 8 * (i % 2), 8 * (i // 2) + 2 * (lane % 4)
            found[lane, i] = block[row, column:column + 2]
    return found


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


@given(seeds, thresholds, heads, batches, sixteens, sixteens)
def test_queries_as_rows(host, seed, threshold, head, batch, query, key):
    expected = fragment(kept(seed, threshold, batch, head, range(query, query + 16), range(key, key + 64)))
    values = np.random.default_rng(0).integers(1, 65536, expected.shape, np.uint16)
    words = values.copy()
    host.drop_queries(ctypes.byref(ctypes.c_uint64(seed)), threshold * 0x10001, head, batch, query, key,
                      pointer(words))
    assert np.array_equal(words, values * expected)


@given(seeds, thresholds, heads, batches, sixteens, sixteens)
def test_keys_as_rows(host, seed, threshold, head, batch, query, key):
    expected = fragment(kept(seed, threshold, batch, head, range(query, query + 64), range(key, key + 16)).T)
    pairs = np.empty((32, 16), np.uint32)
    host.keep_keys(ctypes.byref(ctypes.c_uint64(seed)), threshold * 0x10001, head, batch, key, query, pointer(pairs))
    assert np.array_equal(pairs.view(np.uint16).reshape(32, 16, 2), expected)


@given(st.integers(-2**63, 2**64 - 1))
def test_seeds_in_arrays(host, seed):
    for kind, dtype in ((0, np.uint64), (1, np.int32), (2, np.uint32)):
        array = np.array([seed % 2**64], np.uint64).view(dtype)[:1].copy()
        assert host.seed_in(pointer(array), kind) == int(array[0]) % 2**64
