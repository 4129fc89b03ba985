"""Pairs of thread blocks (pipeline_pair.py): no order of events makes them hang or mixes blocks up."""

import random
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_events import Deadlock, Hazard
from pipeline_model import Piece
from pipeline_pair import Pair
from test_pipeline_model import check_need, names_of_sites, pieces, unfair


def shares(work):
    """Pieces of four warpgroups, as the two of each thread block have them. In pairs every index has queries."""
    return [[replace(piece, own=piece.own[first:][:2], skipped=0,
                     joiners=None if piece.joiners is None else frozenset(w - first for w in piece.joiners))
             for piece in work] for first in (0, 2)]


@st.composite
def pairs(draw):
    return dict(works=shares(draw(st.lists(pieces(4, 4), max_size=9))), third_keys=draw(st.booleans()),
                query_stages=draw(st.sampled_from([1, 2])), counted=draw(st.booleans()), idle_rows=draw(st.booleans()))


@given(pairs(), st.integers(0, 2**32))
def test_no_order_of_events_hangs(pair, seed):
    Pair(**pair).run(random.Random(seed).randrange)


@given(pairs(), st.integers(0, 2**32), st.sampled_from(["first", "last"]))
def test_nor_does_an_unfair_one(pair, seed, favoured):
    Pair(**pair).run(unfair(seed, favoured))


def orders(seed):
    return [random.Random(seed).randrange, unfair(seed, "first"), unfair(seed, "last")][seed % 3]


def pairs_to_break():
    """Pairs that use every wait, arrival and sync of theirs, with the orders of events to try. One thread block has
    none of a piece's blocks, or fewer. Of pieces without blocks neither waits for the other: indices follow each other
    at once, and after the last piece one can end long before the other."""
    work = [Piece(0, 5, ((0, 5), (0, 4), (2, 5), (0, 5))), Piece(0, 4, ((0, 0), (0, 0), (0, 2), (1, 4))),
            Piece(1, 5, ((2, 3),) * 4, joiners=frozenset({1, 2})), Piece(2, 3, ((2, 3),) * 4),
            Piece(1, 1, ((1, 1),) * 4), Piece(1, 1, ((1, 1),) * 4)]
    for seed in range(300):
        yield dict(works=shares(work * 2), third_keys=seed // 6 % 2 == 1,
                   query_stages=1 + seed // 2 % 2, counted=seed // 12 % 2 == 0), orders(seed)


# Who meets the other thread block's warps has met those of its own: the syncs before it are for those that are alone.
IMPLIED = {"others: barriers are made", "scheduler: barriers are made"}


@pytest.mark.parametrize("site", sorted({*names_of_sites(Pair, islice(pairs_to_break(), 12))} - IMPLIED))
def test_each_wait_arrival_and_sync_is_needed(site):
    check_need(Pair, pairs_to_break(), site)


def test_the_model_sees_an_index_without_queries():
    """Scheduler::agree counts pieces, not indices. So the plan pairs only calls whose every index has queries."""
    pair, choose = next(pairs_to_break())
    assert pair["counted"]
    works = [[first, *(replace(piece, skipped=1) for piece in others)] for first, *others in pair["works"]]
    with pytest.raises((Deadlock, Hazard)):
        Pair(**pair | {"works": works}).run(choose)
