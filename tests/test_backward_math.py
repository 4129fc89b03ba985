"""The backward's maths on the host: who sees a key, whose turn it is, where a sequence's query tiles are."""

import ctypes
import heapq

import numpy as np
import pytest
from compilers import HERE, host_library
from hypothesis import assume, example, given
from hypothesis import strategies as st
from test_host_math import INT_MAX, MAX_ROWS, Lengths, Visibility, huge_lengths, masks, visible

lengths = st.one_of(st.integers(1, 20), st.integers(1, 700))
tile_ms = tile_ns = st.sampled_from([64, 128])


class QueryBlockRange(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("begin", "end", "plain_begin", "plain_end")]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return host_library(tmp_path_factory.mktemp("host"), "backward", [HERE / "host" / "backward.cpp"])


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd):
    yield
    assert "runtime error" not in capfd.readouterr().err


def as_visibility(host, mask):
    left, right, chunk = mask
    return Visibility(*(host.unbounded() if size < 0 else size for size in (left, right)), chunk)


def query_intervals(host, mask, first_key, count, seqlen_q, seqlen_k):
    out = np.empty((count, 2), np.int32)
    host.query_intervals(ctypes.byref(as_visibility(host, mask)), seqlen_q, seqlen_k, first_key, count,
                         out.ctypes.data_as(ctypes.c_void_p))
    return out[:, 0].astype(np.int64), out[:, 1].astype(np.int64)


def block_ranges(host, tile_m, mask, seqlen_q, seqlen_k, keys):
    count = -(-seqlen_k // keys)
    out = (QueryBlockRange * count)()
    host.query_block_ranges(tile_m, ctypes.byref(as_visibility(host, mask)), seqlen_q, seqlen_k, keys, count, out)
    return list(out)


@given(masks(), lengths, lengths)
@example((-1, 0, 0), 9, 4)
@example((-1, -1, 3), 9, 4)
@example((2, 0, 3), 4, 9)
def test_query_intervals(host, mask, seqlen_q, seqlen_k):
    """The other way round of which keys a query sees, for keys past the end too."""
    begin, end = query_intervals(host, mask, 0, seqlen_k + 3, seqlen_q, seqlen_k)
    rows = np.arange(seqlen_q)
    assert np.array_equal((begin[:, None] <= rows) & (rows < end[:, None]),
                          visible(mask, rows, seqlen_q, range(seqlen_k + 3), seqlen_k).T)
    assert (begin >= 0).all() and (end <= seqlen_q).all()
    assert (np.diff(begin[:seqlen_k]) >= 0).all() and (np.diff(end[:seqlen_k]) >= 0).all()


@given(masks(huge=True), huge_lengths, huge_lengths, st.data())
@example((-1, -1, MAX_ROWS), MAX_ROWS, 1, None)
@example((MAX_ROWS - 1, MAX_ROWS - 1, 0), MAX_ROWS, 1, None)
@example((MAX_ROWS - 1, MAX_ROWS - 1, 0), 1, MAX_ROWS, None)
def test_query_intervals_of_huge_problems(host, mask, seqlen_q, seqlen_k, data):
    assume(seqlen_q and seqlen_k)
    key = data.draw(st.integers(0, seqlen_k - 1)) if data else 0
    begin, end = query_intervals(host, mask, key, 1, seqlen_q, seqlen_k)
    near = {int(edge) + step for edge in (*begin, *end) for step in (-1, 0, 1)} | {0, seqlen_q - 1}
    rows = np.array(sorted(row for row in near if 0 <= row < seqlen_q))
    in_range = (begin[:, None] <= rows) & (rows < end[:, None])
    assert np.array_equal(in_range, visible(mask, rows, seqlen_q, [key], seqlen_k).T)


@given(masks(), lengths, lengths, tile_ms, tile_ns)
def test_query_block_ranges(host, mask, seqlen_q, seqlen_k, tile_m, keys):
    """Blocks outside are seen by no key; plain ones show each key all of their queries."""
    seen = visible(mask, range(seqlen_q), seqlen_q, range(seqlen_k), seqlen_k)
    for n, blocks in enumerate(block_ranges(host, tile_m, mask, seqlen_q, seqlen_k, keys)):
        mine = seen[:, n * keys:(n + 1) * keys]
        assert 0 <= blocks.begin <= blocks.end <= -(-seqlen_q // tile_m)
        for m in range(-(-seqlen_q // tile_m)):
            part = mine[m * tile_m:(m + 1) * tile_m]
            if not blocks.begin <= m < blocks.end:
                assert not part.any()
            elif blocks.plain_begin <= m < blocks.plain_end:
                assert part.all() and mine.shape[1] == keys


@given(masks(), lengths, lengths, tile_ms, tile_ns)
@example((-1, 0, 0), 700, 300, 64, 128)  # causal, whose first queries see nothing
def test_turns(host, mask, seqlen_q, seqlen_k, tile_m, tile_n):
    """Blocks of keys that work on a query tile have its turns 0, 1, ... in their own order, none left out."""
    tiles = -(-seqlen_q // tile_m)
    first = np.empty(tiles, np.int32)
    host.first_key_blocks(tile_m, tile_n, ctypes.byref(as_visibility(host, mask)), seqlen_q, seqlen_k, tiles,
                          first.ctypes.data_as(ctypes.c_void_p))
    blocks = block_ranges(host, tile_m, mask, seqlen_q, seqlen_k, tile_n)
    for m in range(tiles):
        turns = [n - first[m] for n, block in enumerate(blocks) if block.begin <= m < block.end]
        assert turns == list(range(len(turns)))


def query_steps(host, begin, end, start, backwards, group):
    out = np.empty((max(end - begin, 0) * group, 2), np.int32)
    assert host.query_steps(begin, end, start, backwards, group, out.ctypes.data_as(ctypes.c_void_p)) == len(out)
    return [tuple(step) for step in out.tolist()]


@given(st.integers(0, 9), st.integers(1, 20), st.integers(0, 19), st.integers(1, 9))
def test_query_steps(host, begin, blocks, start, group):
    """Each block of queries of each head once. Where blocks of keys take turns, one that sees fewer queries of a causal
    mask has the same steps until it ends: it never comes to a turn before the block whose turn it is first."""
    end = begin + blocks
    every = [(head, block) for head in range(group) for block in range(begin, end)]
    assert sorted(query_steps(host, begin, end, begin + start % blocks, False, group)) == every
    in_turn = query_steps(host, begin, end, end - 1, True, group)
    assert sorted(in_turn) == every
    assert query_steps(host, begin + 1, end, end - 1, True, group) == in_turn[:(blocks - 1) * group]


@pytest.mark.parametrize(("causal", "rows", "heads", "expected"), [
    (False, 1024, 128, 8), (True, 1024, 128, 16), (False, 4096, 32, 4), (True, 4096, 32, 8), (False, 16384, 8, 1),
    (True, 16384, 8, 8), (False, 64, 7, 7), (False, 1024, 23, 8), (True, 1024, 12, 12), (False, 0, 5, 5)])
def test_heads_in_turn(host, causal, rows, heads, expected):
    """As measured at head dim 256; then of few heads all, of a number that none divides the least that will do."""
    mask = ctypes.byref(as_visibility(host, (-1, 0 if causal else -1, 0)))
    assert host.side_by_side(mask, rows, rows, 64, 64, 1, heads) == expected


@pytest.mark.parametrize(("fitting", "rows", "tile_n", "heads", "expected"), [
    (0, 16384, 64, 8, 4), (1, 32768, 64, 3, 3), (0, 8192, 64, 16, 1), (1, 32768, 128, 16, 1), (5, 4096, 128, 64, 5)])
def test_heads_under_a_mask(host, fitting, rows, tile_n, heads, expected):
    """As measured; otherwise what fits, or fills the machine."""
    assert host.side_by_side_under_mask(fitting, rows, tile_n, heads) == expected


def longest(heads, key_blocks, section, group, thread_blocks=132):
    """When the last causal piece ends, of what the work takes evenly spread: pieces are taken section by section."""
    free, work = [0.0] * thread_blocks, 0.0
    for first in range(0, heads, section):
        for block in range(key_blocks):
            for _ in range(first, min(first + section, heads)):
                piece = 1.3 + group * 2 * (key_blocks - block)  # in steps: what begins and ends it, and its queries
                heapq.heappush(free, heapq.heappop(free) + piece)
                work += piece
    return max(free) * thread_blocks / work


@pytest.mark.parametrize(("heads", "key_blocks", "group", "fitting"), [
    (8, 32, 8, 0), (32, 8, 8, 2), (8, 32, 4, 1), (64, 32, 1, 5), (16, 128, 1, 1), (256, 8, 1, 16)])
def test_heads_under_a_mask_are_spread_evenly(host, heads, key_blocks, group, fitting):
    """Several query heads on a KV head (the first three) took 1.5 to 1.6 times as long as spread evenly."""
    causal = ctypes.byref(as_visibility(host, (-1, 0, 0)))
    for section in (host.side_by_side_under_mask(fitting, 128 * key_blocks, 128, heads),
                    host.side_by_side(causal, 128 * key_blocks, 128 * key_blocks, 64, 128, group, heads)):
        assert longest(heads, key_blocks, section, group) < 1.1
    section = host.side_by_side_under_mask(fitting, 128 * key_blocks, 128, heads)
    assert section >= max(fitting, 1)
    if group > 1:
        assert longest(heads, key_blocks, max(fitting, 1), group) > 1.4


@given(masks(), huge_lengths, huge_lengths, tile_ms, st.integers(1, 128), st.integers(1, INT_MAX))
def test_heads_side_by_side_are_some_of_all(host, mask, rows_q, rows_k, tile, group, heads):
    count = host.side_by_side(ctypes.byref(as_visibility(host, mask)), rows_q, rows_k, tile, tile, group, heads)
    assert 1 <= count <= heads
    assert 1 <= host.side_by_side_under_mask(min(group, heads), rows_k, tile, heads) <= heads


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), tile_ms, st.integers(0, 200))
def test_query_tiles(host, seqlens, tile_m, behind):
    """Ragged sequences have places of their own, and each place finds its sequence."""
    ends = np.cumsum([0, *seqlens], dtype=np.int32)
    lengths = Lengths(int(ends[-1]) + behind, ends.ctypes.data, None)
    first = np.empty(len(seqlens), np.int32)
    count = host.first_tiles(ctypes.byref(lengths), tile_m, len(seqlens), first.ctypes.data_as(ctypes.c_void_p))
    until = first + -(-np.array(seqlens) // tile_m)
    assert first[0] >= 0 and until.max() <= count
    assert all(a <= b for a, b in zip(until, first[1:], strict=False)), "none overlaps the next"
    for b, (begin, end) in enumerate(zip(first, until, strict=True)):
        for tile in range(begin, end):
            assert host.sequence_of(ctypes.byref(lengths), tile_m, len(seqlens), tile) == b


@given(st.lists(st.one_of(st.integers(-5, 900), st.sampled_from([-INT_MAX, INT_MAX])), min_size=2, max_size=20),
       tile_ms, st.integers(1, 700))
def test_query_tiles_stay_inside_whatever_memory_says(host, ends, tile_m, rows):
    ends = np.array(ends, np.int32)
    lengths = Lengths(rows, ends.ctypes.data, None)
    batch = len(ends) - 1
    first = np.empty(batch, np.int32)
    count = host.first_tiles(ctypes.byref(lengths), tile_m, batch, first.ctypes.data_as(ctypes.c_void_p))
    begin = np.clip(ends[:-1], 0, rows)
    seqlens = np.clip(ends[1:], begin, rows) - begin
    assert (first >= 0).all() and (first + -(-seqlens // tile_m)).max() <= count
    assert 0 <= host.sequence_of(ctypes.byref(lengths), tile_m, batch, count - 1) < batch
