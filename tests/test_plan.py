"""The host's plan of a forward call (src/plan.cpp), brute-forced: its kernel, its thread blocks, its memory."""

import csv

import numpy as np
import plan_choices
import pytest
from compiled import MINIMAL
from hypothesis import example, given
from hypothesis import strategies as st
from test_host_math import INT_MAX

from fa3 import _core

VARIANTS = _core.variants()
DTYPES = sorted({v["dtype"] for v in VARIANTS})
FP8 = "float8_e4m3fn"
LARGEST = max(v["head_dim"] for v in VARIANTS)
NATIVE = [(d, d) for d in (32, 48, 64, 80, 96, 112, 128, 160, 192, 256)] + [(192, 128)]
COUNTER_BYTES = 256
FEW_KEYS = 1024  # up to which equal tiles come from a counter too
SWITCHED_OFF = {"window_left": -1, "window_right": -1, "attention_chunk": 0, "causal": False}

head_dims = st.integers(1, LARGEST // 8).map(lambda n: 8 * n)
ratios = st.integers(1, 8) | st.sampled_from([12, 63, 64, 65, 70, 128, 130])
rows = st.one_of(st.integers(1, 20), st.integers(1, 5000))


def ceil_div(a, b):
    return -(-a // b)


@st.composite
def calls(draw, **fixed):
    """Arguments of _core.plan; `fixed` ones are as given."""
    num_heads_kv = draw(st.integers(1, 5))
    call = {
        "dtype": draw(st.sampled_from(DTYPES)), "batch": draw(st.integers(1, 9)), "seqlen_q": draw(rows),
        "seqlen_k": draw(rows), "num_heads": num_heads_kv * draw(ratios), "num_heads_kv": num_heads_kv,
        "head_dim": draw(head_dims), "head_dim_v": draw(head_dims), "ragged": draw(st.booleans()),
        "num_splits": draw(st.sampled_from([0, 0, 0, 1, 2, 3, 100])), "batch_invariant": draw(st.booleans()),
        "pack_gqa": draw(st.sampled_from([None, True, False])),
        "sm_margin": draw(st.sampled_from([0, 1, 20, 131, 132, 500])), "num_sms": draw(st.sampled_from([132, 78, 1])),
        **SWITCHED_OFF,
    }
    mask = draw(st.sampled_from(list(SWITCHED_OFF)))
    call[mask] = {"causal": True, "attention_chunk": 100}.get(mask, 50) if draw(st.booleans()) else call[mask]
    call |= fixed
    if call["dtype"] == FP8:
        call |= {name: ceil_div(call[name], 16) * 16 for name in ("head_dim", "head_dim_v")}
    return call


class Work:
    """What follows from a call and its plan, counted here once more."""

    def __init__(self, call, plan):
        self.variant = VARIANTS[plan["variant"]]
        self.ratio = call["num_heads"] // call["num_heads_kv"]
        self.heads_side_by_side = call["num_heads_kv"] * ceil_div(self.ratio, plan["pack_gqa"])
        self.queries = plan["tile_m"] // 64 * (64 // plan["pack_gqa"])  # of a tile
        self.slots = self.variant["blocks_per_sm"] * max(call["num_sms"] - call["sm_margin"], 1)
        self.key_blocks = max(ceil_div(call["seqlen_k"], plan["tile_n"]), 1)
        self.whole_tiles, self.parts = plan["whole_tiles"], plan["num_splits"]
        if call["ragged"]:  # at most: what is left over of each sequence may need a tile of its own
            m_blocks = call["seqlen_q"] // self.queries + min(call["batch"], call["seqlen_q"])
        else:
            m_blocks = ceil_div(call["seqlen_q"], self.queries) * call["batch"]
        self.tiles = m_blocks * self.heads_side_by_side
        self.split_tiles = max(self.tiles - self.whole_tiles, 0) if self.parts > 1 else 0

    def tiles_of(self, lengths):
        return sum(ceil_div(int(n), self.queries) for n in lengths) * self.heads_side_by_side

    def pieces(self, tiles):
        return min(tiles, self.whole_tiles) + max(tiles - self.whole_tiles, 0) * self.parts

    @property
    def part_bytes(self):
        """Of one part of a tile: for each row the output in fp32, its maximum and its sum, and a gap."""
        return self.variant["tile_m"] * (self.variant["head_dim_v"] + 8) * 4

    @property
    def workspace(self):
        """Bytes of all parts, and of a counter for each warpgroup of a split tile."""
        counters = self.split_tiles * (self.variant["tile_m"] // 64)
        return up_to_256(self.split_tiles * self.parts * self.part_bytes) + up_to_256(counters * 8)


def up_to_256(count):
    return ceil_div(count, 256) * 256


def is_full(call):
    return all(call[name] == value for name, value in SWITCHED_OFF.items())


def padding(variant, call):
    return variant["head_dim"] - call["head_dim"], variant["head_dim_v"] - call["head_dim_v"]


@given(calls())
def test_variant_fits_and_pads_least(call):
    fitting = [v for v in VARIANTS
               if v["dtype"] == call["dtype"] and not v["has_qv"] and min(padding(v, call)) >= 0]
    plan = _core.plan(**call)
    chosen = VARIANTS[plan["variant"]]
    assert chosen in fitting
    assert sum(padding(chosen, call)) == min(sum(padding(v, call)) for v in fitting)
    assert (plan["tile_m"], plan["tile_n"]) == (chosen["tile_m"], chosen["tile_n"])


@pytest.mark.skipif(MINIMAL, reason="a minimal build has one head dim")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dims", NATIVE, ids=str)
def test_native_tiles(dtype, dims):
    """No work is wasted on padding at the head dims that models use."""
    head_dim, head_dim_v = dims
    plan = _core.plan(dtype=dtype, batch=2, seqlen_q=700, seqlen_k=700, num_heads=4, num_heads_kv=2,
                      head_dim=head_dim, head_dim_v=head_dim_v)
    chosen = VARIANTS[plan["variant"]]
    assert (chosen["dtype"], chosen["head_dim"], chosen["head_dim_v"]) == (dtype, head_dim, head_dim_v)


def test_variants_are_told_apart_by_name():
    assert len({v["name"] for v in VARIANTS}) == len(VARIANTS)
    for v in VARIANTS:
        warpgroups = 2 if v["has_qv"] else v["tile_m"] // 64  # with qv, two share 64 rows
        assert v["threads"] == 128 * (warpgroups + 1)
        assert v["shared_memory"] <= 227 * 1024


@pytest.mark.parametrize(("dims", "error"), [((0, 128), ValueError), ((128, 4), ValueError), ((264, 128), ValueError)])
def test_head_dims_without_a_kernel(dims, error):
    with pytest.raises(error, match="head_dim"):
        _core.plan(dtype="bfloat16", batch=1, seqlen_q=1, seqlen_k=1, num_heads=1, num_heads_kv=1, head_dim=dims[0],
                   head_dim_v=dims[1])


# Exactly what is chosen, for calls that matter.

def choices():
    with plan_choices.FILE.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["call", *plan_choices.COLUMNS]
    return lines


def test_the_choices():
    """Who changes them on purpose writes the table anew: see plan_choices.py."""
    expected = {name: line for name, *line in choices()}
    assert list(expected) == list(plan_choices.CALLS)
    found = {name: line for name, *line in plan_choices.rows()}
    assert len(found) == len(expected) or MINIMAL
    assert found == {name: expected[name] for name in found}


def test_a_counter_is_for_unequal_tiles_and_for_many_short_ones():
    """It costs more than it saves where there is little to do."""
    call = {"dtype": "bfloat16", "num_heads": 16, "num_heads_kv": 16, "head_dim": 128, "head_dim_v": 128}
    small, large = ({"batch": 1, "seqlen_q": s, "seqlen_k": s} for s in (1024, 16384))
    assert not _core.plan(**call, **small, causal=True)["dynamic"]
    assert _core.plan(**call, **large, causal=True)["dynamic"]
    assert _core.plan(**call, **large, ragged=True)["dynamic"], "nobody knows that these are equal"
    assert not _core.plan(**call, **large)["dynamic"]
    assert _core.plan(**call, batch=16, seqlen_q=FEW_KEYS, seqlen_k=FEW_KEYS)["dynamic"]
    assert not _core.plan(**call, batch=16, seqlen_q=FEW_KEYS, seqlen_k=FEW_KEYS + 1)["dynamic"]


def test_short_sequences_take_small_tiles():
    """84 sequences of 64: a tile of 128 rows would be half empty, whether or not the maximum is given."""
    call = {"dtype": "bfloat16", "batch": 84, "num_heads": 16, "num_heads_kv": 16, "head_dim": 128, "head_dim_v": 128}
    for longest in (0, 64):
        plan = _core.plan(**call, seqlen_q=84 * 64, seqlen_k=84 * 64, ragged=True, max_seqlen_q=longest,
                          max_seqlen_k=longest)
        assert plan["tile_m"] == 64
    assert _core.plan(**call | {"batch": 1}, seqlen_q=16384, seqlen_k=16384)["tile_m"] > 64


@pytest.mark.parametrize("seqlen_k", [64, 2048, 8192])
def test_no_warpgroup_stands_idle(seqlen_k):
    """The rows of a decoding step fit one warpgroup, of which two thread blocks share a multiprocessor."""
    for num_heads, batch in ((16, 1), (8, 3), (64, 1)):
        plan = _core.plan(dtype="bfloat16", batch=batch, seqlen_q=1, seqlen_k=seqlen_k, num_heads=num_heads,
                          num_heads_kv=8, head_dim=128, head_dim_v=128, causal=True)
        assert plan["tile_m"] == 64


def test_decoding_packs_heads_and_splits_keys():
    """One query of 16 heads on 2: two tiles, and a machine of 132 multiprocessors to fill."""
    call = {"dtype": "bfloat16", "batch": 1, "seqlen_q": 1, "num_heads": 16, "num_heads_kv": 2, "head_dim": 128,
            "head_dim_v": 128}
    plan = _core.plan(**call, seqlen_k=8192)
    assert plan["pack_gqa"] == 8 and plan["num_splits"] > 8 and plan["grid"] == 2 * plan["num_splits"]
    assert _core.plan(**call, seqlen_k=64)["num_splits"] == 1, "one block of keys"
    assert _core.plan(**call | {"batch": 200}, seqlen_k=8192, ragged=False)["grid"] >= 132


@pytest.mark.skipif(MINIMAL, reason="a minimal build has no kernel with qv")
def test_latent_decoding():
    """One query of many heads on one KV head: packed, split for all multiprocessors, the parts joined apart."""
    call = {"dtype": "bfloat16", "seqlen_q": 1, "num_heads": 128, "num_heads_kv": 1, "has_qv": True}
    for head_dim, head_dim_v, padded in ((64, 512, (64, 512)), (40, 264, (64, 512)), (64, 200, (64, 256))):
        plan = _core.plan(**call, batch=16, seqlen_k=4096, head_dim=head_dim, head_dim_v=head_dim_v)
        chosen = VARIANTS[plan["variant"]]
        assert chosen["has_qv"] and (chosen["head_dim"], chosen["head_dim_v"]) == padded
        assert (plan["tile_m"], plan["pack_gqa"], plan["num_splits"], plan["grid"]) == (64, 64, 4, 128)
        rows = 4 * 16 * 128
        assert plan["workspace"] == up_to_256(rows * head_dim_v * 4) + up_to_256(rows * 4)
    call |= {"head_dim": 64, "head_dim_v": 512}
    assert _core.plan(**call, batch=200, seqlen_k=4096)["num_splits"] == 1, "the last round is not split alone"
    assert _core.plan(**call | {"num_heads": 16}, batch=1, seqlen_k=100_000)["num_splits"] > 64
    with pytest.raises(NotImplementedError, match="qv: head dims 128 and 512"):
        _core.plan(**call | {"head_dim": 128}, batch=1, seqlen_k=64)


# What holds for any choice.

@given(calls())
def test_plan_is_a_function_of_its_arguments(call):
    plan = _core.plan(**call)
    _core.plan(**call | {"batch": call["batch"] + 1, "causal": not call["causal"]})  # leaves nothing behind
    assert _core.plan(**call) == plan


@given(calls())
def test_heads_are_packed_as_asked(call):
    plan = _core.plan(**call)
    ratio = call["num_heads"] // call["num_heads_kv"]
    packed = ceil_div(ratio, ceil_div(ratio, 64))
    if call["pack_gqa"] is None and not call["batch_invariant"]:
        assert plan["pack_gqa"] in (1, packed)
    else:  # where bits must not depend on the batch, it is not chosen by the batch
        assert plan["pack_gqa"] == (packed if call["pack_gqa"] else 1)


@given(calls())
@example({"dtype": "bfloat16", "batch": 1, "seqlen_q": 1, "seqlen_k": 2048, "num_heads": 16, "num_heads_kv": 2,
          "head_dim": 128, "head_dim_v": 128, "ragged": False, "num_splits": 0, "batch_invariant": False,
          "pack_gqa": None, "sm_margin": 0, "num_sms": 132, **SWITCHED_OFF, "causal": True})
def test_keys_are_split_as_asked(call):
    plan = _core.plan(**call)
    work = Work(call, plan)
    assert 1 <= plan["num_splits"] <= work.key_blocks, "a part without a block has nothing to do"
    if call["num_splits"] and not call["batch_invariant"]:
        assert plan["num_splits"] == min(call["num_splits"], work.key_blocks)
        assert plan["whole_tiles"] == (0 if plan["num_splits"] > 1 else INT_MAX)
    if call["batch_invariant"] or plan["num_splits"] == 1:  # joined parts have other bits
        assert (plan["num_splits"], plan["whole_tiles"]) == (1, INT_MAX)


@given(calls(num_splits=0, batch_invariant=False))
def test_splits_are_chosen_for_idle_multiprocessors(call):
    """Never more pieces than there is room for at once, beyond full rounds of whole tiles; and few bytes."""
    plan = _core.plan(**call)
    work = Work(call, plan)
    if plan["num_splits"] == 1:
        return
    assert work.split_tiles * work.parts * work.part_bytes <= 256 * 2**20
    assert plan["whole_tiles"] % work.slots == 0, "full rounds come first"
    if not call["ragged"]:
        assert 0 < work.split_tiles * work.parts <= work.slots


@given(calls())
def test_a_cluster_is_the_parts_of_a_tile(call):
    """And each of its thread blocks has one piece: what it leaves in shared memory is over its keys."""
    plan = _core.plan(**call)
    work = Work(call, plan)
    if plan["paired"]:
        return
    assert plan["cluster"] in (1, plan["num_splits"]) and plan["cluster"] <= 16
    if plan["cluster"] > 1:
        assert plan["whole_tiles"] == 0 and plan["grid"] == work.tiles * plan["cluster"]
        assert plan["grid"] <= 0.9 * work.slots, "not all of them run at once"
        assert not plan["dynamic"]


def test_parts_of_short_rows_are_joined_in_clusters():
    """Those of long rows are not: clusters leave multiprocessors idle, and keys come more slowly."""
    call = {"dtype": "bfloat16", "batch": 1, "seqlen_q": 1, "num_heads": 64, "num_heads_kv": 8, "head_dim": 128,
            "head_dim_v": 128}
    for seqlen_k, joined_in_clusters in ((1024, True), (4096, True), (65536, False)):
        plan = _core.plan(**call, seqlen_k=seqlen_k)
        assert plan["num_splits"] > 1 and (plan["cluster"] > 1) == joined_in_clusters


@pytest.mark.parametrize("more, blocks", [
    ({}, 1), ({"batch": 128, "seqlen_k": 2048}, 1), ({"batch": 33}, 2), ({"batch": 256, "seqlen_k": 512}, 2),
    ({"dtype": FP8}, 2), ({"window_left": 3000}, 2), ({"page_size": 64}, 2), ({"num_heads": 8}, 1),
    ({"seqlen_q": 3, "causal": True}, 1),
    ({"head_dim": 96, "head_dim_v": 96}, 1), ({"head_dim": 96, "head_dim_v": 96, "batch": 128}, 2),
], ids=str)
def test_long_pieces_have_a_multiprocessor_to_themselves(more, blocks):
    """Where only memory is waited for, many pieces go one to a multiprocessor at a time."""
    call = {"dtype": "bfloat16", "batch": 48, "seqlen_q": 1, "seqlen_k": 4096, "num_heads": 64, "num_heads_kv": 8,
            "head_dim": 128, "head_dim_v": 128, "num_sms": 132, "seqused_k": True} | more
    if MINIMAL and (call["dtype"], call["head_dim"]) != ("bfloat16", 128):
        pytest.skip("a minimal build has bfloat16 of head dim 128 alone")
    assert _core.plan(**call)["grid"] == 132 * blocks


WIDE = {"dtype": FP8, "batch": 4, "seqlen_q": 4096, "seqlen_k": 4096, "num_heads": 8, "num_heads_kv": 8,
        "head_dim": 256, "head_dim_v": 256, "causal": True}


@pytest.mark.skipif(MINIMAL, reason="a minimal build has no wide head dims")
@given(calls(head_dim=256, head_dim_v=256, dtype=FP8, batch_invariant=False), st.integers(8, 80),
       st.integers(0, 130), st.sampled_from([4096, 16384]), st.sampled_from([0, 0, 1, 20]))
def test_pairs_are_of_whole_tiles(call, tiles, missing, seqlen_k, sm_margin):
    """Two thread blocks have neighbouring tiles of one head, or parts of them, and none is without the other. One call
    in eight that are drawn has pairs."""
    call |= {"seqlen_q": 256 * tiles - missing, "seqlen_k": seqlen_k, "sm_margin": sm_margin}
    plan = _core.plan(**call)
    work = Work(call, plan)
    if not plan["paired"]:
        return
    assert not call["ragged"] and call["window_left"] < 0 and not call["attention_chunk"]
    assert plan["cluster"] == 2 and plan["grid"] % 2 == 0 and plan["num_m_blocks"] % 2 == 0
    assert plan["num_splits"] == 1 or plan["whole_tiles"] % 2 == 0 < plan["whole_tiles"]
    assert work.tiles > plan["grid"]


@pytest.mark.skipif(MINIMAL, reason="a minimal build has no wide head dims")
@pytest.mark.parametrize(("changes", "paired"), [
    ({}, 1), ({"causal": False}, 1), ({"dtype": "bfloat16"}, 0), ({"head_dim_v": 128}, 1),
    ({"head_dim": 128, "head_dim_v": 128, "causal": False}, 1), ({"head_dim": 64, "head_dim_v": 64}, 0),
    ({"seqlen_q": 6144 - 127}, 1), ({"seqlen_q": 6144 - 128}, 0),  # 47 tiles
    ({"seqlen_q": 14 * 128}, 0),  # tiles that turn V for themselves
    ({"seqlen_k": 4095}, 0), ({"sm_margin": 1}, 0), ({"ragged": True}, 0),
    ({"window_left": 2000}, 0), ({"attention_chunk": 2048}, 0), ({"batch": 1, "num_heads_kv": 4, "num_heads": 4}, 0),
    ({"num_splits": 2}, 0), ({"seqused_q": True}, 0), ({"seqused_k": True}, 0)], ids=str)
def test_pairs_share_many_wide_keys(changes, paired):
    assert _core.plan(**WIDE | changes)["paired"] == paired


@given(calls(), st.integers(1, 9), rows, rows)
def test_batch_invariant_plan(call, batch, seqlen_q, seqlen_k):
    """Nothing that the bits depend on follows from the batch's sizes: tile, packing, splits."""
    one = _core.plan(**call | {"batch_invariant": True})
    other = _core.plan(**call | {"batch_invariant": True, "batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k})
    for name in ("variant", "pack_gqa", "num_splits"):
        assert one[name] == other[name]


@given(calls(ragged=False))
def test_grid_of_dense_batches(call):
    plan = _core.plan(**call)
    work = Work(call, plan)
    assert plan["grid"] == min(work.pieces(work.tiles), work.slots) >= 1
    assert plan["num_m_blocks"] == ceil_div(call["seqlen_q"], work.queries)
    if plan["dynamic"]:
        gains = not is_full(call) or call["seqlen_k"] <= FEW_KEYS
        assert work.pieces(work.tiles) > plan["grid"] and gains, "a counter for pieces that need none"


@given(calls(ragged=True), st.data())
def test_grid_of_ragged_batches(call, data):
    """The lengths are not known on the host: whatever they are, no thread block is missing and none waits in vain, and
    the workspace holds every part."""
    cuts = sorted(data.draw(st.lists(st.integers(0, call["seqlen_q"]), min_size=call["batch"] - 1,
                                     max_size=call["batch"] - 1)))
    lengths = np.diff([0, *cuts, call["seqlen_q"]])
    plan = _core.plan(**call, max_seqlen_q=data.draw(st.sampled_from([0, int(lengths.max())])))
    work = Work(call, plan)
    tiles = work.tiles_of(lengths)
    assert min(work.pieces(tiles), work.slots) <= plan["grid"] <= work.slots
    assert tiles <= work.tiles
    if plan["num_splits"] > 1:
        assert plan["workspace"] >= max(tiles - plan["whole_tiles"], 0) * work.parts * work.part_bytes


@given(calls())
def test_order_of_tiles(call):
    plan = _core.plan(**call)
    heads = Work(call, plan).heads_side_by_side * (1 if call["ragged"] else call["batch"])
    assert 1 <= plan["heads_per_section"] <= heads
    assert 0 <= plan["short_m_blocks"] <= plan["num_m_blocks"]
    if is_full(call):
        assert (plan["heads_per_section"], plan["short_m_blocks"]) == (1, 0), "equal tiles need no order"


@pytest.mark.parametrize(("batch", "heads", "seqlen", "section"), [
    (16, 16, 1024, 32), (25, 1, 1024, 25), (2, 20, 1024, 20), (1, 37, 1024, 19), (1, 16, 16384, 4), (1, 3, 16384, 3)])
def test_sections_are_of_equal_size(batch, heads, seqlen, section):
    """Of at most 16 MB of keys and values, but of four heads, and without a rest where their number allows it."""
    plan = _core.plan(dtype="bfloat16", batch=batch, seqlen_q=seqlen, seqlen_k=seqlen, num_heads=heads,
                      num_heads_kv=heads, head_dim=128, head_dim_v=128, causal=True)
    assert plan["heads_per_section"] == section


def test_more_tiles_than_an_index_counts():
    """The last index that a thread block asks for, up to two rounds past the tiles, must still be an int."""
    call = {"dtype": "bfloat16", "seqlen_q": 1, "seqlen_k": 1, "num_heads": 2, "num_heads_kv": 2, "head_dim": 128,
            "head_dim_v": 128, "causal": True, "num_sms": 132, "sm_margin": 0}
    plan = _core.plan(**call, batch=2**30 - 500)
    assert plan["grid"] == 132 * VARIANTS[plan["variant"]]["blocks_per_sm"]
    with pytest.raises(ValueError, match="tiles"):
        _core.plan(**call, batch=2**30)
    with pytest.raises(ValueError, match="tiles"):
        _core.plan(**call | {"seqlen_k": 2**19, "num_heads": 64, "num_heads_kv": 1}, batch=2**17, num_splits=2**12,
                   pack_gqa=False)


@pytest.mark.parametrize("call", [{"batch": 0}, {"seqlen_q": 0}], ids=str)
def test_nothing_to_do(call):
    """No tile, no thread block: fa3_forward returns before it launches one."""
    call = {"batch": 2, "seqlen_q": 5} | call
    plan = _core.plan(dtype="bfloat16", seqlen_k=5, num_heads=1, num_heads_kv=1, head_dim=128, head_dim_v=128, **call)
    assert (plan["grid"], plan["dynamic"], plan["workspace"]) == (0, 0, 0)


# What TMA can address, and what must be copied.

steps = st.one_of(st.sampled_from([0, 8, 16, 128, 1024, 4, 1, 2**20, 2**39, 2**38]), st.integers(-300, 3000))
sizes = st.one_of(st.just(1), st.integers(1, 4))


def element_bytes(call):
    return 1 if call["dtype"] == FP8 else 2


def tma_addresses(strides, address, ragged, batch, length, heads, itemsize):
    """CUDA's rule for cuTensorMapEncodeTiled (16 bytes, below 2^40), where an axis of one entry has no stride and a
    stride of 0 is an axis that the kernel does not step along."""
    def fits(stride):
        return 0 < stride * itemsize < 2**40 and stride * itemsize % 16 == 0

    batch_stride, row, head = strides
    return (address % 16 == 0
            and (ragged or batch == 1 or batch_stride == 0 or fits(batch_stride))
            and (length == 1 or fits(row))
            and (heads == 1 or head == 0 or fits(head)))


@given(calls(), st.data())
def test_copies_and_workspace(call, data):
    call |= {"batch": data.draw(sizes), "seqlen_q": data.draw(sizes), "seqlen_k": data.draw(sizes)}
    axes = {name: (call[f"seqlen_{'q' if name == 'q' else 'k'}"], call["num_heads" if name == "q" else "num_heads_kv"],
                   call["head_dim_v" if name == "v" else "head_dim"]) for name in "qkv"}
    strides = {name: data.draw(st.none() | st.tuples(steps, steps, steps)) for name in axes}
    address = data.draw(st.sampled_from([4096, 4096, 4112, 4098, 4104]))
    plan = _core.plan(**call, **{f"{name}_strides": s for name, s in strides.items()}, address=address)
    workspace = COUNTER_BYTES if plan["dynamic"] else 0
    workspace += Work(call, plan).workspace if plan["num_splits"] > 1 else 0
    for name, (length, heads, head_dim) in axes.items():
        given_strides = strides[name] or (length * heads * head_dim, heads * head_dim, head_dim)
        copied = not tma_addresses(given_strides, address, call["ragged"], call["batch"], length, heads,
                                   element_bytes(call))
        if name == "q" and plan["pack_gqa"] > 1 and given_strides[2] == 0:
            copied = True  # heads that share a tile need an axis that moves
        assert plan[f"copy_{name}"] == copied, f"{name} {given_strides} at {address}"
        if copied:
            total_rows = length * (1 if call["ragged"] else call["batch"])
            workspace += up_to_256(total_rows * heads * head_dim * element_bytes(call))
    assert plan["workspace"] == workspace, "counter, parts and copies, each from a multiple of 256 bytes on"


@pytest.mark.parametrize(("strides", "copied"), [
    ((0, 256, 128), False), ((5000, 256, 0), False), ((0, 256, 0), False),  # broadcast along batch or head
    ((5000, 0, 128), True), ((5000, -256, 128), True), ((-5000, 256, 128), True), ((5000, 256, -128), True),
    ((5000, 257, 128), True), ((5001, 256, 128), True), ((5000, 256, 129), True), ((5000, 260, 128), True),
], ids=str)
def test_strides_of_one_operand(strides, copied):
    plan = _core.plan(dtype="bfloat16", batch=3, seqlen_q=9, seqlen_k=9, num_heads=2, num_heads_kv=2, head_dim=128,
                      head_dim_v=128, k_strides=strides)
    assert (plan["copy_q"], plan["copy_k"], plan["copy_v"]) == (0, copied, 0)


@pytest.mark.skipif(FP8 in DTYPES, reason="this build has fp8 kernels")
def test_a_build_without_fp8():
    call = {"batch": 2, "seqlen_q": 5, "seqlen_k": 5, "num_heads": 1, "num_heads_kv": 1}
    with pytest.raises(NotImplementedError, match="dtype: FA3_FLOAT8_E4M3, but this build has no kernels of it"):
        _core.plan(**call, dtype=FP8, head_dim=128, head_dim_v=128)
    with pytest.raises(ValueError, match=r"head_dim: \(256, 256\) has no kernel of this dtype in this build"):
        _core.plan(**call, dtype="bfloat16", head_dim=256, head_dim_v=256)


@pytest.mark.skipif(not any(variant["dtype"] == "float8_e4m3fn" for variant in VARIANTS), reason="no such kernel")
@pytest.mark.parametrize(("changes", "keys"), [
    ({}, 2112), ({"seqlen_k": 64}, 2112), ({"batch_invariant": True}, 2112), ({"fp8_accumulate": 1}, 1),
    ({"fp8_accumulate": 900}, 900), ({"fp8_accumulate": 2**31 - 1}, 2**31 - 1), ({"fp8_accumulate": -1}, None),
    ({"dtype": "bfloat16"}, None)], ids=str)
def test_sums_of_fp8_move_on_to_fp32_after_whole_blocks(changes, keys):
    call = {"dtype": "float8_e4m3fn", "batch": 4, "seqlen_q": 4096, "seqlen_k": 16384, "num_heads": 16,
            "num_heads_kv": 16, "head_dim": 128, "head_dim_v": 128, "num_splits": 1}
    plan = _core.plan(**call | changes)
    assert plan["accumulate_blocks"] == (max(keys // plan["tile_n"], 2) if keys else 0)


@pytest.mark.skipif(not any(variant["dtype"] == "float8_e4m3fn" for variant in VARIANTS), reason="no such kernel")
@pytest.mark.parametrize(("changes", "blocks"), [
    ({}, 0), ({"seqlen_k": 4097}, 16), ({"seqlen_k": 4097, "fp8_accumulate": -1}, 0), ({"fp8_accumulate": 1}, 1),
    ({"fp8_accumulate": 1023}, 1), ({"fp8_accumulate": 1024}, 8), ({"seqlen_k": 1024, "fp8_accumulate": 1024}, 0),
    ({"seqlen_k": 1153, "fp8_accumulate": 1024}, 8), ({"fp8_accumulate": 2**31 - 1}, 0),
    ({"seqlen_k": 16384, "num_splits": 4}, 0), ({"seqlen_k": 16384, "window_left": 4094, "window_right": 1}, 0),
    ({"seqlen_k": 16384, "window_left": 100}, 16), ({"seqlen_k": 16384, "attention_chunk": 4096}, 0),
    ({"seqlen_k": 16384, "ragged": True, "max_seqlen_k": 4096}, 0), ({"seqlen_k": 16384, "ragged": True}, 22),
    ({"seqlen_k": 2112, "batch_invariant": True}, 0), ({"seqlen_k": 2113, "batch_invariant": True}, 22),
    ({"dtype": "bfloat16", "seqlen_k": 16384}, 0)], ids=str)
def test_long_fp8_sums_move_on_to_the_workspace_where_totals_have_no_room(changes, blocks):
    call = {"dtype": "float8_e4m3fn", "batch": 4, "seqlen_q": 4096, "seqlen_k": 4096, "num_heads": 16,
            "num_heads_kv": 16, "head_dim": 256, "head_dim_v": 256, "num_splits": 1}
    plan = _core.plan(**call | changes)
    assert plan["accumulate_blocks"] == blocks
    if plan["accumulate_blocks"] > 1:  # each thread block has its own
        without = _core.plan(**call | changes | {"fp8_accumulate": -1})
        assert plan["workspace"] - without["workspace"] == plan["grid"] * 128 * 256 * 4


@pytest.mark.skipif(not any(variant["dtype"] == "float8_e4m3fn" for variant in VARIANTS), reason="no such kernel")
@pytest.mark.parametrize(("changes", "turned"), [
    ({}, True), ({"head_dim": 240, "head_dim_v": 240}, True), ({"dtype": "bfloat16"}, False),
    ({"seqlen_q": 2048}, True), ({"seqlen_q": 2047}, False), ({"seqlen_q": 4096, "causal": True}, True),
    ({"seqlen_q": 4095, "causal": True}, False), ({"head_dim": 192, "head_dim_v": 192}, True),
    ({"seqlen_q": 6143, "head_dim": 192, "head_dim_v": 192}, False),
    ({"head_dim": 128, "head_dim_v": 128, "batch": 8}, True),
    ({"seqlen_q": 3839, "head_dim": 128, "head_dim_v": 128, "batch": 8}, False),
    ({"head_dim": 64, "head_dim_v": 64}, True),
    ({"head_dim": 80, "head_dim_v": 80}, True), ({"head_dim": 96, "head_dim_v": 96}, False),
    ({"head_dim": 192, "head_dim_v": 128}, False),
    ({"seqlen_q": 1536, "num_heads": 16, "pack_gqa": 1}, True), ({"window_left": 500, "causal": True}, False),
    ({"attention_chunk": 500}, False), ({"seqlen_k": 0}, False),
    ({"seqlen_k": 1}, False),  # a block of 128 keys, where tiles that turn V have one of 96
    ({"batch_invariant": True}, False), ({"seqused_q": True}, False), ({"seqused_k": True}, False),
    ({"ragged": True}, False), ({"v_strides": (0, 1024, 256)}, True), ({"v_strides": (0, 1023, 256)}, False)], ids=str)
def test_fp8_values_are_turned_once_where_many_tiles_see_them(changes, turned):
    call = {"dtype": "float8_e4m3fn", "batch": 2, "seqlen_q": 6144, "seqlen_k": 3000, "num_heads": 4,
            "num_heads_kv": 4, "head_dim": 256, "head_dim_v": 256, "num_splits": 1}
    plan = _core.plan(**call | changes)
    assert (plan["copy_v"] == 2) == turned
    if turned and not changes:  # in whole blocks of keys
        assert plan["workspace"] == 2 * 4 * -(-3000 // plan["tile_n"]) * plan["tile_n"] * 256


@pytest.mark.skipif(not any(variant["dtype"] == "float8_e4m3fn" and variant["has_qv"] for variant in VARIANTS),
                    reason="no such kernel")
@pytest.mark.parametrize(("changes", "blocks"), [
    ({}, 0), ({"seqlen_k": 4097}, 33), ({"seqlen_k": 4097, "fp8_accumulate": -1}, 0), ({"fp8_accumulate": 1}, 2),
    ({"fp8_accumulate": 1024}, 16)], ids=str)
def test_long_sums_of_fp8_latent_attention(changes, blocks):
    call = plan_choices.latent(4, 64, 4096, 16, num_splits=1) | {"dtype": "float8_e4m3fn"}
    plan = _core.plan(**call | changes)
    assert plan["accumulate_blocks"] == blocks
    without = _core.plan(**call | changes | {"fp8_accumulate": -1})
    assert plan["workspace"] - without["workspace"] == (plan["grid"] * 64 * 512 * 4 if blocks else 0)
