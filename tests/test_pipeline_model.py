"""The forward kernel's barriers (pipeline_model.py): no order of events makes it hang or mixes blocks up."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_model import WARPS, Deadlock, NamedBarrier, ThreadBlock


@st.composite
def thread_blocks(draw):
    """Tiles of any lengths and, inside them, any ranges: more than masks make, so that none of theirs is missed."""
    consumers, tiles = draw(st.sampled_from([2, 3])), []
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.integers(0, 3))
        end = first + draw(st.integers(0, 7))
        edges = st.lists(st.integers(first, end), min_size=2, max_size=2).map(sorted).map(tuple)
        own = st.none() | st.just((first, end)) | edges.map(lambda own: own if own[0] < own[1] else None)
        tiles.append((first, end, [draw(own) for _ in range(consumers)]))
    return consumers, tiles


@given(thread_blocks(), st.integers(0, 2**32))
def test_no_order_of_events_hangs(thread_block, seed):
    ThreadBlock(*thread_block).run(random.Random(seed).randrange)


@given(thread_blocks(), st.integers(0, 2**32), st.sampled_from(["first", "last"]))
def test_nor_does_an_unfair_one(thread_block, seed, favoured):
    """One end of the list, the producer or the last warpgroup and the copies, runs as far ahead as it can."""
    chance = random.Random(seed)

    def choose(count):
        return chance.randrange(count) if chance.random() < 0.1 else 0 if favoured == "first" else count - 1

    ThreadBlock(*thread_block).run(choose)


def test_the_model_sees_a_deadlock():
    """A turn that nobody passes on: the model must not be blind to what it is for."""
    block = ThreadBlock(3, [(0, 5, [(0, 5)] * 3)])
    block.turn[1].join = lambda syncs=0, arrivals=0: None
    with pytest.raises(Deadlock):
        block.run(random.Random(0).randrange)


def test_the_model_sees_a_turn_passed_twice():
    block = ThreadBlock(2, [(0, 5, [(0, 5)] * 2)])
    block.turn[1] = NamedBarrier(arrivals=WARPS)
    with pytest.raises(AssertionError, match="passed twice"):
        block.run(random.Random(0).randrange)
