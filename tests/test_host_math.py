"""The kernels' host-callable maths (src/attention), compiled here and brute-forced against spec.md's formulas."""

import ctypes
import itertools

import numpy as np
import pytest
from compilers import HERE, host_library
from hypothesis import assume, example, given
from hypothesis import strategies as st

TILE_NS = (48, 64, 80, 96, 112, 128)
WARPGROUP_ROWS = 64
MAX_ROWS = 2**30
INT_MAX = 2**31 - 1


class Visibility(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("left", "right", "chunk")]


class BlockRange(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("begin", "end", "plain_begin", "plain_end", "settled")]


class TileOrder(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("heads_per_section", "short_m_blocks")]


class Lengths(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int), ("cu_seqlens", ctypes.c_void_p), ("seqused", ctypes.c_void_p)]


class KeyRows(ctypes.Structure):
    _fields_ = [("lengths", Lengths), ("leftpad", ctypes.c_void_p), ("entries", ctypes.c_void_p),
                ("paged", ctypes.c_bool)]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return host_library(tmp_path_factory.mktemp("host"), "attention", [HERE / "host" / "attention.cpp"],
                        "-Wno-unknown-pragmas")  # `#pragma unroll` is nvcc's


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd):
    yield
    assert "runtime error" not in capfd.readouterr().err


@st.composite
def masks(draw, huge=False):
    """(left, right, chunk): windows as fa3.h's fa3_mask gives them, -1 unbounded; a causal mask has right == 0."""
    sizes = st.one_of(st.integers(0, 8), st.integers(0, 400))
    if huge:
        sizes = st.one_of(sizes, st.sampled_from([MAX_ROWS - 2, MAX_ROWS - 1]), st.integers(0, MAX_ROWS - 1))
    left, right = (draw(st.one_of(st.just(-1), sizes)) for _ in "lr")
    if draw(st.booleans()):
        right = 0
    return left, right, draw(st.one_of(st.just(0), sizes))


def as_visibility(host, mask):
    left, right, chunk = mask
    return Visibility(*(host.unbounded() if size < 0 else size for size in (left, right)), chunk)


def visible(mask, rows, seqlen_q, keys, seqlen_k):
    """spec.md section 2, as it is written there: whether each of `rows` sees each of `keys`."""
    left, right, chunk = mask
    p, j = (np.asarray(rows, np.int64) + seqlen_k - seqlen_q)[:, None], np.asarray(keys, np.int64)[None, :]
    seen = (j >= 0) & (j < seqlen_k) & (p == p)
    if left >= 0:
        seen &= p - left <= j
    if right >= 0:
        seen &= j <= p + right
    if chunk:
        start = np.floor_divide(p, chunk) * chunk
        seen &= (start <= j) & (j < start + chunk)
    return seen


def key_intervals(host, mask, first_row, count, seqlen_q, seqlen_k):
    out = np.empty((count, 2), np.int32)
    host.key_intervals(ctypes.byref(as_visibility(host, mask)), seqlen_q, seqlen_k, first_row, count,
                       out.ctypes.data_as(ctypes.c_void_p))
    return out[:, 0].astype(np.int64), out[:, 1].astype(np.int64)


lengths = st.one_of(st.integers(0, 20), st.integers(0, 500))


@given(masks(), lengths, lengths)
@example((-1, 0, 0), 9, 4)  # negative positions: the first five rows see nothing
@example((-1, -1, 3), 9, 4)
@example((2, 0, 3), 4, 9)
def test_key_intervals(host, mask, seqlen_q, seqlen_k):
    assume(seqlen_q)
    begin, end = key_intervals(host, mask, 0, seqlen_q, seqlen_q, seqlen_k)
    keys = np.arange(seqlen_k)
    assert np.array_equal((begin[:, None] <= keys) & (keys < end[:, None]),
                          visible(mask, range(seqlen_q), seqlen_q, keys, seqlen_k))
    assert (begin >= 0).all() and (end <= seqlen_k).all()
    assert (np.diff(begin) >= 0).all() and (np.diff(end) >= 0).all(), "both ends are monotone in the row"


huge_lengths = st.one_of(st.integers(0, 300), st.integers(MAX_ROWS - 300, MAX_ROWS), st.integers(0, MAX_ROWS))


@given(masks(huge=True), huge_lengths, huge_lengths, st.data())
@example((-1, -1, MAX_ROWS), MAX_ROWS, 1, None)
@example((MAX_ROWS - 1, MAX_ROWS - 1, 0), MAX_ROWS, 1, None)
@example((MAX_ROWS - 1, MAX_ROWS - 1, 0), 1, MAX_ROWS, None)
def test_key_intervals_of_huge_problems(host, mask, seqlen_q, seqlen_k, data):
    """Lengths to 2^30, windows below that: nothing overflows (the sanitizer would tell) and the edges are right."""
    assume(seqlen_q)
    row = data.draw(st.integers(0, seqlen_q - 1)) if data else 0
    begin, end = key_intervals(host, mask, row, 1, seqlen_q, seqlen_k)
    near = {int(edge) + step for edge in (*begin, *end) for step in (-1, 0, 1)} | {0, seqlen_k - 1}
    keys = np.array(sorted(near))
    in_range = (begin[:, None] <= keys) & (keys < end[:, None])
    assert np.array_equal(in_range, visible(mask, [row], seqlen_q, keys, seqlen_k))


def ranges(host, tile_n, mask, groups, seqlen_q, seqlen_k):
    first, last = (np.ascontiguousarray(column, np.int32) for column in np.transpose(groups))
    out = (BlockRange * len(groups))()
    host.block_ranges(tile_n, ctypes.byref(as_visibility(host, mask)), seqlen_q, seqlen_k, len(groups),
                      first.ctypes.data_as(ctypes.c_void_p), last.ctypes.data_as(ctypes.c_void_p), out)
    return list(out)


@given(st.sampled_from(TILE_NS), st.integers(1, 300), huge_lengths)
def test_every_block_is_the_range_of_queries_that_see_all(host, tile_n, seqlen_q, seqlen_k):
    every = BlockRange()
    host.all_blocks(tile_n, seqlen_k, ctypes.byref(every))
    mask, = ranges(host, tile_n, (-1, -1, 0), [(0, seqlen_q - 1)], seqlen_q, seqlen_k)
    assert bytes(every) == bytes(mask)


def by_block(seen, tile_n):
    """(rows, blocks) of: sees a key of the block, sees all tile_n keys of it (a cut block has fewer)."""
    rows, seqlen_k = seen.shape
    blocks = -(-seqlen_k // tile_n)
    padded = np.zeros((rows, blocks * tile_n), bool)
    padded[:, :seqlen_k] = seen
    padded = padded.reshape(rows, blocks, tile_n)
    return padded.any(-1), padded.all(-1)


def check_meaning(host, blocks, some, every):
    """What BlockRange's comment says, for a group of rows."""
    needed = np.flatnonzero(some.any(0))
    if not needed.size:
        assert blocks.end == blocks.begin
        return
    assert (blocks.begin, blocks.end) == (needed[0], needed[-1] + 1)
    for block in range(blocks.begin, blocks.end):
        assert (blocks.plain_begin <= block < blocks.plain_end) == every[:, block].all()
        assert host.needs_mask(ctypes.byref(blocks), block) == (not every[:, block].all())
    assert blocks.begin <= blocks.settled <= blocks.end
    last_seen = np.where(some.any(1), some.shape[1] - 1 - some[:, ::-1].argmax(1), blocks.end)
    assert (last_seen >= blocks.settled).all(), "each row has met its last key in [settled, end)"


def steps_of(host, blocks):
    """Consumer::attend's loops (src/kernels/forward_mma.cuh): (block, masked), in order."""
    n_block = blocks.end - 1
    yield n_block, bool(host.needs_mask(ctypes.byref(blocks), n_block))
    n_block -= 1
    while n_block >= max(blocks.settled, blocks.begin):
        yield n_block, True
        n_block -= 1
    while n_block >= max(blocks.plain_begin, blocks.begin):
        yield n_block, False
        n_block -= 1
    while n_block >= blocks.begin:
        yield n_block, True
        n_block -= 1


def check_loops(host, blocks, some, every):
    """Each block of the range once, masked wherever some row does not see all of it; without a mask, each row has met
    a key."""
    steps = list(steps_of(host, blocks))
    assert [block for block, _ in steps] == list(range(blocks.end - 1, blocks.begin - 1, -1))
    met = np.zeros(len(some), bool)
    for position, (block, masked) in enumerate(steps):
        if not masked:
            assert every[:, block].all()
            assert position == 0 or met.all(), "an unmasked step takes no first maximum"
        met |= some[:, block]
    assert np.array_equal(met, some[:, blocks.begin:blocks.end].any(1))


def turns_taken(first, end, blocks):
    """Consumer::attend's turns, where [first, end) is loaded: of skipped blocks and of steps."""
    skipped, count = end - blocks.end, blocks.end - blocks.begin
    before = skipped - (count == 0 and skipped > 0)
    return before + max(count - 1, 0) + (blocks.begin - first)


def own_blocks(host, blocks, first, end):
    """A warpgroup's range of the loaded blocks [first, end), as Scheduler::describe makes it; None: no rows."""
    own = BlockRange()
    host.no_blocks_at(first, ctypes.byref(own))
    if blocks is not None:
        ctypes.pointer(own)[0] = blocks
    host.clip(ctypes.byref(own), first, end)
    return own


@pytest.mark.parametrize("tile_n", TILE_NS)
@given(masks(), st.integers(1, 500), st.integers(0, 700), st.sampled_from([64, 128, 192, 21, 60, 63]),
       st.integers(1, 8))
@example((-1, 0, 0), 300, 40, 192, 1)
@example((-1, 0, 0), 40, 300, 192, 3)
@example((60, 0, 0), 500, 500, 128, 2)
@example((-1, -1, 100), 500, 430, 192, 2)
@example((7, 0, 0), 500, 5, 192, 4)
@example((130, 0, 0), 400, 700, 192, 3)
def test_blocks_of_tiles(host, tile_n, mask, seqlen_q, seqlen_k, tile_m, parts):
    """Of whole tiles and of their parts, of warpgroups that have 64 queries or, with packed heads, fewer."""
    queries = WARPGROUP_ROWS if tile_m % WARPGROUP_ROWS == 0 else tile_m // 3
    seen = visible(mask, range(seqlen_q), seqlen_q, np.arange(seqlen_k), seqlen_k)
    some, every = by_block(seen, tile_n)
    for first in range(0, seqlen_q, tile_m):
        last = min(first + tile_m, seqlen_q) - 1
        tile, = ranges(host, tile_n, mask, [(first, last)], seqlen_q, seqlen_k)
        check_meaning(host, tile, some[first:last + 1], every[first:last + 1])
        edges = [tile.begin + (tile.end - tile.begin) * part // parts for part in range(parts + 1)]
        for top in range(first, first + tile_m, queries):
            rows, blocks = slice(top, min(top + queries, seqlen_q)), None
            if top < seqlen_q:
                blocks, = ranges(host, tile_n, mask, [(top, rows.stop - 1)], seqlen_q, seqlen_k)
                check_meaning(host, blocks, some[rows], every[rows])
            for begin, end in itertools.pairwise(edges):
                own = own_blocks(host, blocks, begin, end)
                check_part(host, own, begin, end, some[rows], every[rows])


def check_part(host, own, begin, end, some, every):
    """What a warpgroup does of a part, the loaded blocks [begin, end)."""
    assert begin <= own.begin <= own.end <= end and own.begin <= own.settled <= own.end
    assert not some[:, begin:own.begin].any() and not some[:, own.end:end].any(), "a block that is seen is left out"
    if own.end > own.begin:
        check_loops(host, own, some, every)
    else:
        assert own.begin == begin, "where the loop that skips blocks stops"
    if end > begin:
        assert turns_taken(begin, end, own) == end - begin - 1, "every warpgroup takes the same number of turns"


@given(st.sampled_from(TILE_NS), st.integers(-300, 300), st.integers(-300, 300), st.integers(0, 1))
def test_hide_columns(host, tile_n, begin, end, row):
    scores = np.random.default_rng(0).standard_normal(tile_n // 2).astype(np.float32)
    expected = scores.copy()
    for element in range(len(scores)):
        column = 8 * (element // 4) + element % 2
        if element // 2 % 2 == row and not begin <= column < end:
            expected[element] = -np.inf
    host.hide_scores(tile_n, scores.ctypes.data_as(ctypes.c_void_p), row, begin, end, ctypes.c_float(-np.inf))
    assert np.array_equal(scores, expected)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_m_blocks", [1, 2, 3, 5, 8])
def test_tile_order(host, heads, num_m_blocks):
    for section in range(1, heads + 1):
        for short in range(num_m_blocks + 2):
            out = np.empty((heads * num_m_blocks, 2), np.int32)
            host.tile_order(ctypes.byref(TileOrder(section, short)), heads, num_m_blocks,
                            out.ctypes.data_as(ctypes.c_void_p))
            tail = min(short, num_m_blocks)
            body, rest = np.split(out, [heads * (num_m_blocks - tail)])
            assert sorted(map(tuple, out)) == [(m, h) for m in range(num_m_blocks) for h in range(heads)]
            assert (body[:, 0] >= tail).all() and (rest[:, 0] < tail).all(), "the shortest of all heads come last"
            assert (np.diff(rest[:, 0]) <= 0).all()
            sections = body[:, 1] // section
            assert (np.diff(sections) >= 0).all(), "one section after the other"
            for which in np.unique(sections):
                assert (np.diff(body[sections == which, 0]) <= 0).all(), "long tiles first"


def array_or_null(values):
    return None if values is None else np.array(values, np.int32)


def address(array):
    return None if array is None else array.ctypes.data


garbage = st.one_of(st.integers(-3, 200), st.integers(-2**31, INT_MAX))


@given(st.integers(1, 5), st.one_of(st.integers(0, 200), st.integers(0, MAX_ROWS)), st.booleans(), st.booleans(),
       st.data())
def test_spans_stay_inside(host, batch, rows, ragged, uses, data):
    """Whatever the device arrays say: a kernel must stay inside the arrays it was given."""
    def numbers(count):
        return data.draw(st.lists(garbage, min_size=count, max_size=count))

    cu_seqlens = array_or_null(numbers(batch + 1) if ragged else None)
    seqused = array_or_null(numbers(batch) if uses else None)
    out = np.empty((batch, 2), np.int32)
    host.spans(ctypes.byref(Lengths(rows, address(cu_seqlens), address(seqused))), batch,
               out.ctypes.data_as(ctypes.c_void_p))
    begin, length = out.astype(np.int64).T
    assert (begin >= 0).all() and (length >= 0).all() and (begin + length <= rows).all()
    for b in range(batch):
        first, last = (0, rows) if cu_seqlens is None else map(int, cu_seqlens[b:b + 2])
        if not 0 <= first <= last <= rows:
            continue
        expected = last - first
        if seqused is not None:
            expected = min(max(int(seqused[b]), 0), expected)
        assert (begin[b], length[b]) == (first, expected), "sound lengths are taken as they are"


@given(st.integers(1, 5), st.integers(0, 200), st.booleans(), st.booleans(), st.data())
def test_keys_behind_left_padding(host, batch, rows, uses, sound, data):
    """Padding hides the first rows in use, and no more than there are."""
    values = st.integers(0, rows) if sound else garbage
    numbers = st.lists(values, min_size=batch, max_size=batch)
    seqused = array_or_null(data.draw(numbers) if uses else None)
    leftpad = array_or_null(data.draw(numbers))
    out = np.empty((batch, 2), np.int32)
    host.key_spans(ctypes.byref(KeyRows(Lengths(rows, None, address(seqused)), address(leftpad), None, False)), batch,
                   out.ctypes.data_as(ctypes.c_void_p))
    for (begin, length), hidden, used in zip(out.tolist(), leftpad.tolist(),
                                             [rows] * batch if seqused is None else seqused.tolist(), strict=True):
        used = min(max(used, 0), rows)
        assert begin == min(max(hidden, 0), used) and begin + length == used


@given(st.integers(1, 5), st.integers(0, 200), st.booleans(), st.data())
def test_keys_in_pages(host, batch, rows, uses, data):
    """Pages begin with a sequence's first key: cu_seqlens says how many, at most as many as have room."""
    cu_seqlens = array_or_null(data.draw(st.lists(garbage, min_size=batch + 1, max_size=batch + 1)))
    seqused = array_or_null(data.draw(st.lists(garbage, min_size=batch, max_size=batch)) if uses else None)
    out = np.empty((batch, 2), np.int32)
    keys = KeyRows(Lengths(rows, address(cu_seqlens), address(seqused)), None, None, True)
    host.key_spans(ctypes.byref(keys), batch, out.ctypes.data_as(ctypes.c_void_p))
    room = np.clip(np.diff(cu_seqlens.astype(np.int64)), 0, rows)
    expected = room if seqused is None else np.minimum(np.maximum(seqused, 0), room)
    assert (out[:, 0] == 0).all() and (out[:, 1] == expected).all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 3), st.booleans(), st.data())
def test_every_row_has_its_owner(host, lengths, spare, uses, data):
    used = [data.draw(st.integers(0, length)) for length in lengths] if uses else lengths
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    seqused = array_or_null(used if uses else None)
    rows = int(ends[-1]) + spare
    out = np.empty((rows, 3), np.int32)  # its last byte of three says whether the row is used; the rest is padding
    host.owners(ctypes.byref(Lengths(rows, address(ends), address(seqused))), len(lengths), ctypes.c_int64(rows),
                out.ctypes.data_as(ctypes.c_void_p))
    found = {index: (batch, row) for index, (batch, row, flag) in enumerate(out.tolist()) if flag & 1}
    assert found == {int(ends[b]) + row: (b, row) for b, length in enumerate(used) for row in range(length)}
