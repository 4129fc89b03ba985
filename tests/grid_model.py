"""What thread blocks do to each other through memory, as a model for test_grid_model.py.

Counter (src/arch/counter.cuh), Scheduler::take_index and finish (src/kernels/forward_tiles.cuh), PartRows
(src/kernels/forward_split.cuh), DqAdder (src/kernels/backward_load.cuh), convert_dq_kernel
(src/kernels/backward_kernel.cuh) and Parts (src/kernels/quantize_parts.cuh), one atomic access at a time. Global
memory keeps what it held: nobody zeroes it, but for the turns and counts of the backward. Shared memory, in which the
blocks of a cluster leave their parts, ends with its block.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass, field

COUNT_BITS = 24


def take_turns(running, choose):
    """Until all are done: `choose(n)` is one of n, which goes on. Yields after each of their steps."""
    for turn in itertools.count():
        if not running:
            return
        assert turn < 100_000, "deadlock"
        which = choose(len(running))
        try:
            next(running[which])
        except StopIteration:
            del running[which]
        yield


@dataclass
class Counter:
    """A 64-bit word whose upper 40 bits say whose count the lower 24 are."""

    memory: dict
    address: object
    ticket: int
    left_out: str | None

    def open(self):
        found = self.memory[self.address]
        yield
        if self.left_out != "open" and found >> COUNT_BITS != self.ticket and self.memory[self.address] == found:
            self.memory[self.address] = self.ticket << COUNT_BITS

    def add(self):
        before = self.memory[self.address]
        self.memory[self.address] = (before + 1) % 2**64
        return before % 2**COUNT_BITS

    def close(self):
        if self.left_out != "close":
            self.memory[self.address] = 0


@dataclass
class Launch:
    """One launch of `grid` thread blocks on `tiles` tiles, those from `whole_tiles` on in `parts` pieces each."""

    memory: dict  # address -> word; counters and parts, kept from launch to launch
    ticket: int
    grid: int
    tiles: int
    whole_tiles: int
    parts: int
    counted: bool
    left_out: str | None = None
    done: list = field(default_factory=list)  # (tile, part), in the order in which they were computed
    joined: list = field(default_factory=list)  # tiles

    @property
    def pieces(self):
        return min(self.tiles, self.whole_tiles) + max(self.tiles - self.whole_tiles, 0) * self.parts

    def counter(self, address):
        return Counter(self.memory, address, self.ticket, self.left_out)

    def piece(self, index):
        if index < self.whole_tiles:
            return index, 0, 1
        tile, part = divmod(index - self.whole_tiles, self.parts)
        return self.whole_tiles + tile, part, self.parts

    def scheduler(self, number, found):
        """A thread block's scheduler warp, which may be ahead of the warps that compute, or behind them."""
        index, stride, counter = number, 2 * (self.grid - number) - 1, self.counter("pieces")
        while index < self.pieces:
            found.append(self.piece(index))
            assert len(found) <= self.pieces, "a piece is found again"
            yield
            if self.counted:
                if index == number:
                    yield from counter.open()
                index = self.grid + counter.add()
                yield
            else:
                index, stride = index + stride, 2 * self.grid - stride
        if self.counted and index != number and index + 1 == self.grid + self.pieces:
            counter.close()
        found.append(None)

    def consumer(self, found):
        """One warpgroup of those that compute: each has parts and counters of its own, so that one stands for all."""
        for count in itertools.count():
            while count >= len(found):
                yield
            if found[count] is None:
                return
            yield from self.compute(*found[count])

    def compute(self, tile, part, parts):
        counter = self.counter(("done", tile))
        if parts > 1:
            yield from counter.open()
            yield
        self.done.append((tile, part))
        if parts == 1:
            return
        self.memory["part", tile, part] = self.ticket, len(self.done)
        yield
        before = counter.add()
        if before + 1 == parts:
            counter.close()
            yield
            assert all(self.memory["part", tile, n][0] == self.ticket for n in range(parts)), "a part is not there yet"
            self.joined.append(tile)

    def run(self, choose):
        """`choose(n)` is one of n warps: which goes on next. Blocks that are last may not have begun yet."""
        warps = []
        for number in range(self.grid):
            found = []
            warps += [self.scheduler(number, found), self.consumer(found)]
        for _ in take_turns(warps, choose):
            assert len(self.done) <= self.pieces, "a piece is computed again"


@dataclass
class Cluster:
    """Thread blocks that have a tile's parts, and join them in shared memory."""

    parts: int
    warpgroups: int  # that compute, in each block
    left_out: str | None = None
    shared: dict = field(default_factory=dict)  # block -> {warpgroup: its part lies there}
    arrived: dict = field(default_factory=lambda: defaultdict(int))
    joined: list = field(default_factory=list)

    def meet(self, name, where, count):
        """A barrier that `count` warpgroups come to."""
        self.arrived[name, where] += 1
        while self.left_out != name and self.arrived[name, where] < count:
            yield

    def consumer(self, block, warpgroup, steps):
        everyone = self.parts * self.warpgroups
        mine = self.shared.setdefault(block, {})
        for _ in range(steps):
            assert not any(mine.values()), "a part lies over keys that are still needed"
            yield
        yield from self.meet("consumers", block, self.warpgroups)
        mine[warpgroup] = True
        yield
        yield from self.meet("left", None, everyone)
        for other in range(self.parts):
            assert self.shared.get(other, {}).get(warpgroup), "a part is not there yet, or no more"
            yield
        self.joined.append((block, warpgroup))
        yield from self.meet("read", None, everyone)
        self.arrived["ended", block] += 1
        if self.arrived["ended", block] == self.warpgroups:
            del self.shared[block]

    def run(self, choose):
        """`choose(n)` is one of n: how many steps a warpgroup has, and which goes on next."""
        running = [self.consumer(block, warpgroup, choose(4)) for block in range(self.parts)
                   for warpgroup in range(self.warpgroups)]
        for _ in take_turns(running, choose):
            pass


@dataclass
class Sums:
    """Blocks of keys that add to the sums of query tiles in memory that nobody has cleared, in any order."""

    starts: tuple  # of each block: the tile that it begins with, one after the other to the last, then those before it
    tiles: int
    left_out: str | None = None
    state: dict = field(default_factory=lambda: defaultdict(int))  # 0, CLAIMED or BEGUN
    sums: dict = field(default_factory=dict)  # tile -> blocks whose sums are in it

    CLAIMED, BEGUN = 1, 2

    def adder(self, block):
        for step in range(self.tiles):
            tile = (self.starts[block] + step) % self.tiles
            state = self.state[tile]
            yield
            if state != self.BEGUN:
                state = self.state[tile]
                if state == 0 and self.left_out != "claim":
                    self.state[tile] = self.CLAIMED
                yield
            while state == self.CLAIMED and self.left_out != "wait" and self.state[tile] != self.BEGUN:
                yield
            if state == 0:
                yield  # the copy engine takes its time
                self.sums[tile] = [block]
                yield
                self.state[tile] = self.BEGUN
            else:
                self.sums.setdefault(tile, ["whatever was there"]).append(block)
            yield

    def run(self, choose):
        running = [self.adder(block) for block in range(len(self.starts))]
        for _ in take_turns(running, choose):
            pass
        for tile in range(self.tiles):
            assert sorted(map(str, self.sums[tile])) == sorted(map(str, range(len(self.starts)))), "each block once"


@dataclass
class Turns:
    """The same in one order: thread blocks take blocks of keys in theirs, and each waits for its turn at each tile."""

    thread_blocks: int
    blocks: int  # of keys
    tiles: int
    late: frozenset  # blocks that pass a turn when the sums of the next tile are on their way, or the last have arrived
    left_out: str | None = None
    taken: int = 0
    turns: dict = field(default_factory=lambda: defaultdict(int))  # tile -> blocks whose sums have arrived
    sums: dict = field(default_factory=lambda: defaultdict(list))

    def adder(self):
        while self.taken < self.blocks:
            block = self.taken
            self.taken += 1
            passing = None
            for tile in reversed(range(self.tiles)):
                while self.left_out != "wait" and self.turns[tile] != block:
                    yield
                yield  # the copy engine takes its time
                if passing is not None:
                    self.turns[passing] += 1
                self.sums[tile].append(block)
                if block in self.late:
                    passing = tile
                else:
                    self.turns[tile] += 1
                yield
            if passing is not None and self.left_out != "last":
                self.turns[passing] += 1

    def run(self, choose):
        for _ in take_turns([self.adder() for _ in range(self.thread_blocks)], choose):
            pass
        for tile in range(self.tiles):
            assert self.sums[tile] == list(range(self.blocks)), "in one order"


@dataclass
class EarlyRounding:
    """A kernel that adds to heads' sums, one that rounds them and begins before that has ended, and a third one."""

    pieces: tuple  # of each thread block that adds: the heads that its pieces of work are of
    heads: int
    left_out: str | None = None
    sums: dict = field(default_factory=lambda: defaultdict(int))  # head -> pieces that are in them
    added: dict = field(default_factory=lambda: defaultdict(int))  # head -> pieces counted
    ended: int = 0  # blocks that add
    last_pieces: int = 0  # blocks that have said that they have no more pieces than their last one
    rounded: list = field(default_factory=list)
    begun_behind: bool = False

    def adding(self, head):
        return sum(mine.count(head) for mine in self.pieces)

    def adder(self, block):
        for number, head in enumerate(self.pieces[block], 1):
            if number == len(self.pieces[block]):
                self.last_pieces += 1
            yield
            if self.left_out == "order":
                self.added[head] += 1
            yield  # the copy engine takes its time
            self.sums[head] += 1
            yield
            if self.left_out != "order":
                self.added[head] += 1
            yield  # dK and dV are stored
        if not self.pieces[block]:
            self.last_pieces += 1
        self.ended += 1

    def end_of_adders(self):
        while self.ended < len(self.pieces):
            yield

    def rounder(self, head):
        while self.last_pieces < len(self.pieces):
            yield
        is_last = head == self.heads - 1 and self.left_out != "last"
        if is_last or (self.left_out != "count" and self.added[head] != self.adding(head)):
            yield from self.end_of_adders()
        yield
        assert self.sums[head] == self.adding(head), "rounded before all has been added"
        self.rounded.append(head)

    def behind(self):
        while len(self.rounded) < self.heads:
            yield
        assert self.ended == len(self.pieces), "what comes next in the stream begins before the first kernel has ended"
        self.begun_behind = True

    def run(self, choose):
        running = [*(self.adder(block) for block in range(len(self.pieces))), *map(self.rounder, range(self.heads)),
                   self.behind()]
        for _ in take_turns(running, choose):
            pass
        assert sorted(self.rounded) == list(range(self.heads)) and self.begun_behind


@dataclass
class Meeting:
    """Thread blocks that leave parts of each of a few units, and need all parts of a unit."""

    memory: dict  # address -> word, kept from launch to launch
    ticket: int
    blocks: int
    values: dict  # (unit, block) -> what the block finds
    units: int
    left_out: str | None = None

    def block(self, rank):
        departures = Counter(self.memory, "departures", self.ticket, None)
        for unit in range(self.units):
            yield
            self.memory["part", unit, rank] = self.ticket, self.values[unit, rank]
            if unit == 0:
                yield from departures.open()
            for other in range(self.blocks):
                while not self.is_there(self.memory["part", unit, other]):
                    yield
                assert self.memory["part", unit, other][1] == self.values[unit, other], "a part of another launch"
                yield
        early = self.left_out == "count"  # whoever comes first
        if departures.add() + 1 == (1 if early else self.blocks):
            for unit, other in itertools.product(range(self.units), range(self.blocks)):
                yield
                if self.left_out != "clear":
                    self.memory["part", unit, other] = None
            departures.close()

    def is_there(self, part):
        """Of this launch, or of a replay of it before."""
        return isinstance(part, tuple) and (self.left_out == "ticket" or part[0] == self.ticket)

    def run(self, choose):
        for _ in take_turns([self.block(rank) for rank in range(self.blocks)], choose):
            pass
