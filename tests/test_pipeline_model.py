"""The forward kernel's barriers (pipeline_model.py): no order of events makes it hang or mixes blocks up."""

import random
import re
from itertools import islice
from pathlib import Path

import pipeline_model
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_events import Deadlock, Hazard, NamedBarrier
from pipeline_model import WARPS, Piece, ThreadBlock

KERNELS = Path(__file__).parent.parent / "src" / "kernels"


@st.composite
def pieces(draw, consumers, row_groups):
    """A piece of any length and, inside it, any ranges: more than masks make, so that none of theirs is missed."""
    first = draw(st.integers(0, 3))
    end = first + draw(st.integers(0, 7))
    edges = st.lists(st.integers(first, end), min_size=2, max_size=2).map(sorted).map(tuple)
    own = st.just((first, end)) | edges.map(lambda own: own if own[0] < own[1] else (first, first))
    joiners = st.frozensets(st.integers(0, consumers - 1))
    return Piece(first, end, tuple(draw(own) for _ in range(row_groups)), draw(st.booleans()),
                 draw(st.none() | joiners), draw(st.integers(0, 2)))


@st.composite
def thread_blocks(draw):
    has_qv = draw(st.booleans())
    consumers = 2 if has_qv else draw(st.sampled_from([1, 2, 3]))
    eight_bits = draw(st.booleans())
    runs_free = eight_bits and not has_qv and consumers == 2
    turned = runs_free and draw(st.booleans())
    work = draw(st.lists(pieces(consumers, 1 if has_qv else consumers), max_size=9))
    return dict(consumers=consumers, pieces=work, query_stages=1 if has_qv else draw(st.sampled_from([1, 2])),
                counted=draw(st.booleans()), idle_rows=draw(st.booleans()), has_qv=has_qv,
                eight_bits=eight_bits, third_keys=runs_free and draw(st.booleans()),
                turned=turned, gathers=not turned and draw(st.booleans()),
                values_early=consumers == 2 and not has_qv and not eight_bits and draw(st.booleans()),
                keys_first=consumers == 1 and draw(st.booleans()))


@given(thread_blocks(), st.integers(0, 2**32))
def test_no_order_of_events_hangs(thread_block, seed):
    ThreadBlock(**thread_block).run(random.Random(seed).randrange)


def unfair(seed, favoured):
    """One end of the list, the scheduler and the loader or the last warpgroup and the copies, runs far ahead."""
    chance = random.Random(seed)

    def choose(count):
        return chance.randrange(count) if chance.random() < 0.1 else 0 if favoured == "first" else count - 1

    return choose


@given(thread_blocks(), st.integers(0, 2**32), st.sampled_from(["first", "last"]))
def test_nor_does_an_unfair_one(thread_block, seed, favoured):
    ThreadBlock(**thread_block).run(unfair(seed, favoured))


# The model must not be blind to what it is for: without any one of the kernel's waits, arrivals and syncs, it finds an
# order of events that hangs, that reads what is not there, or that takes a piece from the counter too early.

def blocks_to_break():
    """Thread blocks that use every wait, arrival and sync, with the orders of events to try."""
    for seed in range(900):
        has_qv = seed % 3 == 2
        alone = not has_qv and seed % 7 == 6
        consumers = 2 if has_qv else 1 if alone else 2 + seed % 2
        row_groups = 1 if has_qv else consumers
        whole, others = (0, 5), (((0, 5),) * (row_groups - 1))
        work = [Piece(0, 5, (whole, *others), cut=True), Piece(0, 5, ((4, 5), *others), cut=True, skipped=1),
                Piece(0, 5, ((2, 3),) * row_groups, joiners=frozenset({1})),
                Piece(1, 1, ((1, 1),) * row_groups), Piece(0, 5, (*others, (0, 0)))] * 3
        eight_bits = seed // 16 % 2 == 1
        runs_free = eight_bits and not has_qv and consumers == 2
        fair = seed // 3 % 3
        choose = random.Random(seed).randrange if fair == 0 else unfair(seed, ["first", "last"][fair - 1])
        yield dict(consumers=consumers, pieces=work, query_stages=1 if has_qv else 1 + seed // 2 % 2,
                   counted=seed // 4 % 2 == 1, idle_rows=seed // 8 % 2 == 0, has_qv=has_qv,
                   eight_bits=eight_bits, third_keys=runs_free and seed // 64 % 2 == 0,
                   turned=runs_free and seed % 4 == 0, gathers=not (runs_free and seed % 4 == 0) and seed // 5 % 3 == 1,
                   values_early=consumers == 2 and not has_qv and not eight_bits and seed % 5 == 0,
                   keys_first=alone), choose


def names_of_sites(kind, to_break):
    """Of the waits, arrivals and syncs that these meet."""
    pipeline_model.SITES.clear()
    for options, choose in to_break:
        kind(**options).run(choose)
    return sorted(pipeline_model.SITES)


def check_need(kind, to_break, site):
    for options, choose in to_break:
        try:
            kind(**options, left_out=site).run(choose)
        except (Deadlock, Hazard):
            return
    pytest.fail(f"nothing went wrong without \"{site}\"")


@pytest.mark.parametrize("site", names_of_sites(ThreadBlock, islice(blocks_to_break(), 32)))
def test_each_wait_arrival_and_sync_is_needed(site):
    check_need(ThreadBlock, blocks_to_break(), site)


def test_the_model_sees_a_turn_passed_twice():
    block = ThreadBlock(2, [Piece(0, 5, ((0, 5),) * 2)])
    block.turn[1] = NamedBarrier(WARPS, arrivals_expected=WARPS, arrivals=WARPS)
    with pytest.raises(Hazard, match="passed twice"):
        block.run(random.Random(0).randrange)


def test_the_model_sees_that_a_loader_must_not_wait_with_what_is_there():
    """While one warpgroup skips blocks, another waits for its turn: then the last block gathered is waited for."""
    block = ThreadBlock(2, [Piece(0, 5, ((4, 5), (0, 5)))], gathers=True)
    block.later = 1
    with pytest.raises(Deadlock):
        block.run(random.Random(0).randrange)


@pytest.mark.parametrize("slots", [1, 3])
def test_the_model_sees_too_few_slots(monkeypatch, slots):
    """The scheduler runs up to four pieces ahead: with fewer slots than that, one is overwritten."""
    monkeypatch.setattr(pipeline_model, "TILE_SLOTS", slots)
    block = ThreadBlock(2, [Piece(0, 2, ((0, 2),) * 2)] * 9)
    block.ahead = 4
    with pytest.raises((Deadlock, Hazard)):
        block.run(unfair(0, "first"))


@pytest.mark.parametrize(("header", "name", "size"), [
    ("forward_traits", "kStages", pipeline_model.STAGES), ("forward_traits", "kTileSlots", pipeline_model.TILE_SLOTS),
    ("forward_load", "kLead", pipeline_model.LEAD), ("forward_keys", "kLater", pipeline_model.LATER),
    ("forward_traits", "kGatherers", pipeline_model.GATHERERS)])
def test_the_model_has_the_kernels_sizes(header, name, size):
    source = (KERNELS / f"{header}.cuh").read_text()
    found = re.findall(rf"(?:constexpr int|,) {name} = (?:\w[\w:| ]* \? \w+ : )?(\d+);", source)
    assert found == [str(size)]
