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
# Of 2**15 cases those that drop an element.
dropped = st.sampled_from([0, 1, 3277, 16384, 16385, 32767]) | st.integers(0, 32767)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp("dropout"), "dropout", [HERE / "host" / "dropout.cpp"],
                           f"-I{HERE / 'host' / 'lane'}", "-Wno-unknown-pragmas")
    library.seed_in.restype = ctypes.c_uint64
    return library


def bounds(dropped):
    """What a kernel is given."""
    inverted = dropped > 16384
    return (32768 - dropped if inverted else dropped) * 0x10001, 0xFFFFFFFF if inverted else 0


def kept(seed, dropped, batch, head, queries, keys):
    query, key = np.meshgrid(*(np.array(x, np.uint64) for x in (queries, keys)), indexing="ij")
    return philox.is_kept(dropped / 32768, philox.fifteen_bits(seed, np.uint64(batch), np.uint64(head), query, key))


def fragment(block):
    """(16, n) as each lane of a warp holds it: words of two neighbouring columns, (32, n / 4, 2)."""
    found = np.empty((32, block.shape[1] // 4, 2), block.dtype)
    for lane in range(32):
        for i in range(found.shape[1]):
            row, column = lane // 4 + 8 * (i % 2), 8 * (i // 2) + 2 * (lane % 4)
            found[lane, i] = block[row, column:column + 2]
    return found


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.parametrize("blocks", [4, 5])
@given(seeds, dropped, heads, batches, sixteens, st.integers(0, 2**23))
def test_queries_as_rows(host, blocks, seed, dropped, head, batch, query, n_block):
    """Whole calls, and an odd number of blocks that begins with either half of one."""
    key = 16 * blocks * n_block
    expected = fragment(kept(seed, dropped, batch, head, range(query, query + 16), range(key, key + 16 * blocks)))
    values = np.random.default_rng(0).integers(1, 65536, expected.shape, np.uint16)
    words = values.copy()
    host.drop_queries(ctypes.c_uint64(seed), *bounds(dropped), head, batch, query, key, blocks, pointer(words))
    assert np.array_equal(words, values * expected)


@given(seeds, dropped, heads, batches, sixteens, sixteens)
def test_keys_as_rows(host, seed, dropped, head, batch, query, key):
    expected = fragment(kept(seed, dropped, batch, head, range(query, query + 64), range(key, key + 16)).T)
    halves, elements = np.empty((32, 16), np.uint32), np.empty((32, 16, 2), bool)
    host.keep_keys(ctypes.c_uint64(seed), *bounds(dropped), head, batch, key, query, pointer(halves),
                   pointer(elements))
    assert np.array_equal(halves.view(np.uint16).reshape(32, 16, 2), expected * np.uint16(0xFFFF))
    assert np.array_equal(elements, expected)


@given(st.integers(-2**63, 2**64 - 1))
def test_seeds_in_arrays(host, seed):
    for kind, dtype in ((0, np.uint64), (1, np.int32), (2, np.uint32)):
        array = np.array([seed % 2**64], np.uint64).view(dtype)[:1].copy()
        assert host.seed_in(pointer(array), kind) == int(array[0]) % 2**64
