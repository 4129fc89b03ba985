"""What thread blocks do to each other through global memory, as a model for test_grid_model.py.

Counter (src/arch/counter.cuh), Scheduler::take_index and finish (src/kernels/forward_tiles.cuh) and PartRows
(src/kernels/forward_split.cuh), one atomic access at a time. Memory keeps what it held: nobody zeroes it.
"""

import itertools
from dataclasses import dataclass, field

COUNT_BITS = 24


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
        while warps:
            which = choose(len(warps))
            try:
                next(warps[which])
            except StopIteration:
                del warps[which]
            assert len(self.done) <= self.pieces, "a piece is computed again"
