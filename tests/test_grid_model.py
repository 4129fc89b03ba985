"""Thread blocks that take pieces from a counter and leave parts for each other (grid_model.py), in any order."""

import random
from collections import defaultdict

import pytest
from grid_model import COUNT_BITS, Cluster, EarlyRounding, Launch, Meeting, Sums, Turns
from hypothesis import given
from hypothesis import strategies as st

TICKETS = st.integers(1, 2**40 - 2)  # not those that zeros and ones in memory stand for: chance excludes them


def memory_of(content, chance):
    """Memory that nobody has zeroed."""
    words = {"zeros": lambda: 0, "ones": lambda: 2**64 - 1, "random": lambda: chance.randrange(2**64)}
    return defaultdict(words[content])


def check(launch, chance):
    for address in [address for address in launch.memory if address[0] == "part"]:
        launch.memory[address] = None, 0  # what a launch before has left does not count
    launch.run(chance.randrange)
    expected = sorted((tile, part) for tile, part, _ in map(launch.piece, range(launch.pieces)))
    assert sorted(launch.done) == expected, "each piece once"
    split = range(launch.whole_tiles, launch.tiles) if launch.parts > 1 else ()
    assert sorted(launch.joined) == list(split), "each split tile once"
    counters = [word for address, word in launch.memory.items() if address[0] != "part"]
    assert not any(counters), "a counter that is not set back counts on when a graph is replayed"


@st.composite
def launches(draw):
    return dict(grid=draw(st.integers(1, 6)), tiles=draw(st.integers(0, 12)), whole_tiles=draw(st.integers(0, 14)),
                parts=draw(st.integers(1, 5)), counted=draw(st.booleans()))


@given(launches(), launches(), TICKETS, TICKETS, st.sampled_from(["zeros", "ones", "random"]), st.integers(0, 2**32))
def test_each_piece_is_computed_once(first, other, ticket, other_ticket, content, seed):
    """A graph's replays, which have one ticket, with another call between them in the same memory. The grid may be
    larger than there are pieces, as a ragged batch's is."""
    chance = random.Random(seed)
    memory = memory_of(content, chance)
    for call, its_ticket in ((first, ticket), (first, ticket), (other, other_ticket), (first, ticket)):
        check(Launch(memory, its_ticket, **call), chance)


@pytest.mark.parametrize(("left_out", "content"), [("open", "ones"), ("open", "random"), ("close", "zeros")])
@pytest.mark.parametrize("call", [
    dict(grid=3, tiles=9, whole_tiles=9, parts=1, counted=True),
    dict(grid=3, tiles=2, whole_tiles=0, parts=4, counted=False)], ids=["counter", "parts"])
def test_the_model_sees_what_is_left_out(left_out, content, call):
    chance = random.Random(0)
    memory = memory_of(content, chance)
    with pytest.raises(AssertionError):
        for _ in range(2):
            check(Launch(memory, 12345, **call, left_out=left_out), chance)


def test_the_largest_count_leaves_the_ticket_alone():
    """As many are counted as there are pieces, at most what 24 bits hold: kMostCounted in src/plan.cpp."""
    memory = {"pieces": (12345 << COUNT_BITS) + 2**COUNT_BITS - 2}
    counter = Launch(memory, 12345, 1, 1, 1, 1, True).counter("pieces")
    assert list(counter.open()) == [None] and counter.add() == 2**COUNT_BITS - 2
    assert memory["pieces"] >> COUNT_BITS == 12345


@given(st.integers(2, 16), st.integers(1, 3), st.integers(0, 2**32))
def test_a_cluster_joins_the_parts_of_its_blocks(parts, warpgroups, seed):
    cluster = Cluster(parts, warpgroups)
    cluster.run(random.Random(seed).randrange)
    assert sorted(cluster.joined) == [(block, w) for block in range(parts) for w in range(warpgroups)]
    assert not cluster.shared


@pytest.mark.parametrize("left_out", ["consumers", "left", "read"])
def test_the_model_sees_a_barrier_of_a_cluster_left_out(left_out):
    with pytest.raises(AssertionError, match="a part"):
        for seed in range(100):
            Cluster(3, 2, left_out).run(random.Random(seed).randrange)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 2**32))
def test_each_block_of_keys_adds_once(starts, tiles, seed):
    Sums(tuple(start % tiles for start in starts), tiles).run(random.Random(seed).randrange)


@pytest.mark.parametrize("left_out", ["claim", "wait"])
def test_sums_need_each_of_their_steps(left_out):
    with pytest.raises(AssertionError):
        for seed in range(100):
            Sums((0, 0, 1), 3, left_out).run(random.Random(seed).randrange)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 5), st.frozensets(st.integers(0, 7)), st.integers(0, 2**32))
def test_blocks_of_keys_add_in_one_order(thread_blocks, blocks, tiles, late, seed):
    Turns(thread_blocks, blocks, tiles, late).run(random.Random(seed).randrange)


@pytest.mark.parametrize("left_out", ["wait", "last"])
def test_one_order_needs_each_of_its_steps(left_out):
    with pytest.raises(AssertionError):
        for seed in range(100):
            Turns(3, 4, 3, frozenset(range(4)), left_out).run(random.Random(seed).randrange)


@given(st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=5), st.integers(0, 2**32))
def test_sums_are_rounded_when_all_has_been_added(pieces, seed):
    EarlyRounding(tuple(map(tuple, pieces)), 5).run(random.Random(seed).randrange)


@pytest.mark.parametrize("left_out", ["order", "count", "last"])
def test_early_rounding_needs_each_of_its_steps(left_out):
    with pytest.raises(AssertionError):
        for seed in range(300):
            EarlyRounding(((0, 1), (0, 2), (1, 2)), 3, left_out).run(random.Random(seed).randrange)


def meet_again(ticket, blocks, units, content, seed, left_out=None):
    """A graph's replays on other data, in memory of which something else writes words between them: the counter, and
    what looks like parts but for the ticket."""
    chance = random.Random(seed)
    memory = memory_of(content, chance)
    for launch in range(3):
        values = {(unit, rank): (launch, chance.random()) for unit in range(units) for rank in range(blocks)}
        memory["departures"] = chance.choice([memory["departures"], 0, chance.randrange(2**64)])
        for part in values:
            memory["part", *part] = chance.choice([memory["part", *part], (ticket ^ 1, (launch, 0.5))])
        Meeting(memory, ticket, blocks, values, units, left_out).run(chance.randrange)


@given(TICKETS, st.integers(2, 6), st.integers(1, 4), st.sampled_from(["zeros", "ones", "random"]),
       st.integers(0, 2**32))
def test_blocks_meet_whatever_memory_held(ticket, blocks, units, content, seed):
    meet_again(ticket, blocks, units, content, seed)


@pytest.mark.parametrize(("left_out", "fault"), [("clear", "another launch"), ("ticket", "another launch"),
                                                 ("count", "deadlock")])
def test_a_meeting_needs_each_of_its_steps(left_out, fault):
    with pytest.raises(AssertionError, match=fault):
        for seed in range(100):
            meet_again(12345, 3, 2, "zeros", seed, left_out)
