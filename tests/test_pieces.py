"""How work is cut into pieces: packed heads, tiles, and parts along the keys. Each bit of work is in exactly one.

The arithmetic is the library's own (src/attention), compiled here; how it is put together is modelled on Scheduler
and place_of in src/kernels/forward_{tiles,rows}.cuh, which run on a GPU only.
"""

import ctypes
import itertools

import numpy as np
import pytest
from compilers import HERE, host_library
from hypothesis import example, given
from hypothesis import strategies as st

ROWS = 64  # of a warpgroup
INT_MAX = 2**31 - 1


class Packing(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("ratio", "heads", "positions", "rows", "tiles")]
    _fields_ += [("reciprocal", ctypes.c_uint32)]


class Splits(ctypes.Structure):
    _fields_ = [("whole_tiles", ctypes.c_int), ("count", ctypes.c_int), ("multiplier", ctypes.c_uint32),
                ("shift", ctypes.c_int)]


class TileOrder(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("heads_per_section", "short_m_blocks")]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp("pieces"), "pieces", [HERE / "host" / "pieces.cpp"])
    library.count_pieces.restype = ctypes.c_int64
    library.count_pieces.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return library


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd):
    yield
    assert "runtime error" not in capfd.readouterr().err


def packing_of(host, ratio, packed):
    packing = Packing()
    host.packing_of(ratio, packed, ctypes.byref(packing))
    return packing


def rows_of(host, packing):
    """(position, head) of each of a warpgroup's rows."""
    positions, heads = (np.empty(ROWS, np.int32) for _ in range(2))
    host.rows_of(ctypes.byref(packing), *(x.ctypes.data_as(ctypes.c_void_p) for x in (positions, heads)))
    return positions, heads


def pieces(host, splits, first, count):
    """(tile, part, parts) each."""
    out = np.empty((count, 3), np.int32)
    host.pieces(ctypes.byref(splits), first, count, out.ctypes.data_as(ctypes.c_void_p))
    return out


def boundaries(host, blocks, parts):
    out = np.empty(parts + 1, np.int32)
    host.boundaries(blocks, parts, out.ctypes.data_as(ctypes.c_void_p))
    return out.astype(np.int64)


# Packing.

@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("ratio", [*range(1, 71), 128, 129, 1000])
def test_rows_of_a_warpgroup(host, ratio, packed):
    """The reciprocal is exact on every row, and each pair of a position and a head has one row."""
    packing = packing_of(host, ratio, packed)
    row = np.arange(ROWS)
    positions, heads = rows_of(host, packing)
    assert np.array_equal(positions, row // packing.heads) and np.array_equal(heads, row % packing.heads)
    assert packing.rows == packing.positions * packing.heads <= ROWS
    assert packing.rows > ROWS - packing.heads, "another position would fit"
    pairs = set(zip(positions[:packing.rows], heads[:packing.rows], strict=True))
    assert pairs == set(itertools.product(range(packing.positions), range(packing.heads)))


@pytest.mark.parametrize("ratio", [*range(1, 71), 128, 129, 1000])
def test_heads_are_dealt_to_tiles_evenly(host, ratio):
    plain, packed = packing_of(host, ratio, False), packing_of(host, ratio, True)
    assert (plain.heads, plain.positions, plain.rows, plain.tiles) == (1, ROWS, ROWS, ratio)
    assert packed.ratio == plain.ratio == ratio
    assert packed.tiles == -(-ratio // ROWS), "as few tiles as hold the heads"
    last = ratio - (packed.tiles - 1) * packed.heads
    assert 1 <= last <= packed.heads and packed.heads - last < packed.tiles, "no tile has much fewer than another"


# Splits.

splits_drawn = st.tuples(st.integers(0, 40), st.integers(1, 20))


def splits_of(host, whole_tiles, count):
    splits = Splits()
    host.splits_of(whole_tiles, count, ctypes.byref(splits))
    assert (splits.whole_tiles, splits.count) == (whole_tiles, count)
    return splits


@given(st.integers(1, 300) | st.integers(1, INT_MAX), st.lists(st.integers(0, INT_MAX), min_size=1))
@example(INT_MAX, [INT_MAX, INT_MAX - 1])
@example(2**30 + 1, [2**30, INT_MAX])
@example(46340, [46340 * 46340 - 1])
def test_quotients(host, divisor, n):
    n = np.array([*n, *(x for i in range(1, 4) for x in (i * divisor - 1, i * divisor) if x <= INT_MAX)], np.int32)
    out = np.empty_like(n)
    host.quotients(divisor, n.ctypes.data_as(ctypes.c_void_p), len(n), out.ctypes.data_as(ctypes.c_void_p))
    assert np.array_equal(out, n // divisor)


@given(splits_drawn, st.integers(0, 60))
def test_pieces_of_tiles(host, drawn, tiles):
    """Each tile whole, or each of its parts, once; and pieces() counts them."""
    splits = splits_of(host, *drawn)
    expected = [(tile, 0, 1) if tile < splits.whole_tiles else (tile, part, splits.count) for tile in range(tiles)
                for part in range(1 if tile < splits.whole_tiles else splits.count)]
    count = host.count_pieces(ctypes.byref(splits), tiles)
    assert count == len(expected)
    assert [tuple(piece) for piece in pieces(host, splits, 0, count)] == expected


def test_nothing_is_split(host):
    none = splits_of(host, host.unsplit(), 1)
    for tile in (0, 1, 12345, INT_MAX - 1):
        assert tuple(pieces(host, none, tile, 1)[0]) == (tile, 0, 1)
        assert host.count_pieces(ctypes.byref(none), tile) == tile


@given(st.integers(0, INT_MAX), st.integers(1, 1000), st.integers(0, INT_MAX))
@example(0, 64, INT_MAX)
@example(INT_MAX - 1, 2, INT_MAX)
def test_pieces_of_very_many_tiles(host, whole_tiles, count, index):
    splits = splits_of(host, whole_tiles, count)
    tile, part, parts = map(int, pieces(host, splits, index, 1)[0])
    if index < whole_tiles:
        assert (tile, part, parts) == (index, 0, 1)
    else:
        assert parts == count and 0 <= part < count
        assert whole_tiles + (tile - whole_tiles) * count + part == index
    assert host.count_pieces(ctypes.byref(splits), tile) <= index < host.count_pieces(ctypes.byref(splits), tile + 1)


@given(st.integers(0, 200) | st.integers(0, 2**30), st.integers(1, 100))
@example(2**30, 1000)
@example(INT_MAX, 46340)
@example(46339, 46340)
def test_parts_of_a_tile(host, blocks, parts):
    """Parts follow each other without a gap, and none has two blocks more than another."""
    edges = boundaries(host, blocks, parts)
    assert edges[0] == 0 and edges[-1] == blocks
    sizes = np.diff(edges)
    assert set(sizes) <= {blocks // parts, -(-blocks // parts)}
    assert parts > blocks or (sizes > 0).all(), "an empty part, though there are blocks for all"


# All of it together.

@st.composite
def batches(draw):
    """(lengths, heads_kv, ratio, ragged); dense lengths are those that seqused leaves of the longest."""
    lengths = draw(st.lists(st.integers(0, 200), min_size=1, max_size=4))
    return lengths, draw(st.integers(1, 2)), draw(st.integers(1, 13) | st.integers(60, 70)), draw(st.booleans())


def tiles_of(host, order, lengths, ragged, heads, tile_m):
    """(m_block, head, sequence) of each tile, by index: find_dense and find_ragged."""
    def at(index, heads, m_blocks):
        out = (ctypes.c_int * 2)()
        host.tile_at(ctypes.byref(order), index, heads, m_blocks, out)
        return tuple(out)

    if ragged:
        for sequence, length in enumerate(lengths):
            m_blocks = -(-length // tile_m)
            yield from ((*at(i, heads, m_blocks), sequence) for i in range(heads * m_blocks))
    else:
        heads_of_all, m_blocks = heads * len(lengths), -(-max(lengths) // tile_m)
        for m_block, head in (at(i, heads_of_all, m_blocks) for i in range(heads_of_all * m_blocks)):
            yield m_block, head % heads, head // heads


@pytest.mark.parametrize("consumers", [1, 2, 3], ids=lambda n: f"tile {64 * n}")
@given(batches(), st.booleans(), splits_drawn, st.integers(1, 6), st.integers(0, 4), st.booleans())
def test_each_row_is_computed_once_from_every_part(host, consumers, batch, packed, splits, section, short, causal):
    """place_of each row of each piece: every query of every head once for each part, and nothing else."""
    lengths, heads_kv, ratio, ragged = batch
    packing = packing_of(host, ratio, packed)
    positions, heads = rows_of(host, packing)
    splits = splits_of(host, *splits)
    tile_m, heads_of_tiles = consumers * packing.positions, heads_kv * packing.tiles
    tiles = list(tiles_of(host, TileOrder(section, short), lengths, ragged, heads_of_tiles, tile_m))
    parts_seen = [np.zeros((heads_kv * ratio, length), np.float64) for length in lengths]
    for tile, _, parts in pieces(host, splits, 0, host.count_pieces(ctypes.byref(splits), len(tiles))):
        m_block, head, sequence = tiles[tile]
        head_kv, first_head = head // packing.tiles, head % packing.tiles * packing.heads
        for warpgroup in range(consumers):
            first = m_block * tile_m + warpgroup * packing.positions
            if causal:
                first -= host.ahead(lengths[sequence], tile_m, packing.positions)
                assert first >= 0 or first <= -packing.positions, "a warpgroup has rows ahead of the first, and others"
            query = first + positions
            exists = ((np.arange(ROWS) < packing.rows) & (query >= 0) & (query < lengths[sequence])
                      & (first_head + heads < ratio))
            places = head_kv * ratio + first_head + heads[exists], query[exists]
            assert len(set(zip(*places, strict=True))) == exists.sum(), "two rows of a tile have one place"
            parts_seen[sequence][places] += 1 / parts
    for seen in parts_seen:
        np.testing.assert_allclose(seen, 1, rtol=1e-9)
