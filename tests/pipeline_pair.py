"""Two thread blocks of pipeline_model.py that share keys and values, as src/kernels/forward_pair.cuh has them.

Loader::wait_for_other; ContiguousKeys::load and Loader::load_turned_v, with which each brings its half of a block to
both; Scheduler::agree; and the meetings at the kernel's start and end. What one does in the other's shared memory is
under way for any time: a half lands in each of the two on its own, an arrival and the taken index when they will.
"""

from functools import partial

from pipeline_events import Barrier, Events, expect
from pipeline_model import ThreadBlock


class Meeting:
    """barrier.cluster, of so many warps: those that have ended are not waited for."""

    def __init__(self, warps):
        self.warps, self.met, self.generation = warps, 0, 0

    def join(self, met=0, ended=0):
        self.met, self.warps = self.met + met, self.warps - ended
        if self.met == self.warps:
            self.met, self.generation = 0, self.generation + 1


class PairedBlock(ThreadBlock):
    """One of the two, which `other` is told once it exists."""

    copies_of_block = 2

    def __init__(self, rank, events, **options):
        super().__init__(**options, consumers=2, eight_bits=True, turned=True, events=events)
        self.rank, self.name = rank, f"block {rank}'s "
        self.both_empty = {name: [Barrier(1) for _ in pipe.empty] for name, pipe in (("k", self.k), ("v", self.v))}
        self.halves = {}  # (pipe, stage) -> halves of the block there, each with whose it is
        self.told, self.known, self.index = Barrier(1), Barrier(1), None
        self.sent = []  # arrivals at the other thread block that are under way
        self.other = self.meeting = None

    def barriers(self):
        return *super().barriers(), *self.both_empty["k"], *self.both_empty["v"], self.told, self.known

    def bring(self, pipe, stage, value):
        if pipe in self.q:
            super().bring(pipe, stage, value)
            return
        for block, there in (self, pipe), (self.other, self.other.k if pipe is self.k else self.other.v):
            there.content[stage] = "half written"
            self.events.under_way.append(partial(block.land, there, stage, value, self.rank))

    def land(self, pipe, stage, value, rank):
        """Half of a block is here."""
        halves = self.halves[pipe, stage] = {(value, rank)} | {
            half for half in self.halves.get((pipe, stage), ()) if half[0] == value}
        if len(halves) == 2:
            pipe.content[stage] = value
        pipe.full[stage].update(copies=-1)

    def arrive_at_other(self, site, barrier):
        def land():
            self.sent.remove(land)
            barrier.update(arrivals=1)

        if self.there(site):
            self.sent.append(land)
            self.events.under_way.append(land)

    def wait_for_other(self, name, stage, parity):
        if name != "q":
            self.arrive_at_other(f"loader: other knows that {name} was given back", self.other.both_empty[name][stage])
            yield from self.wait(f"loader: {name} given back in both", self.both_empty[name][stage], parity)

    def take_index(self, count):
        """The first takes, of the pieces that both have. The second is told."""
        yield from super().take_index(count)
        if self.counted:
            yield from self.agree(count)

    def agree(self, count):
        def land():
            self.other.index = count
            self.other.told.update(copies=-1)

        parity = (count - 1) % 2
        if self.rank == 0:
            yield from self.wait("scheduler: index before is known", self.known, parity ^ 1)
            if self.there("scheduler: index is sent"):
                self.events.under_way.append(land)
        else:
            self.arrive("scheduler: index announced", self.told, copies=1)
            yield from self.wait("scheduler: index is told", self.told, parity)
            yield lambda: True
            expect(self.index == count, "the other has taken another piece")
            self.arrive_at_other("scheduler: index is known", self.other.known)

    def meet(self, site):
        """The arrivals that this warp has sent are in then, and those of its thread block's others that it knows to be
        sent: barrier.cluster.arrive.release. Any that it does not know of come after it in some order of events."""
        if self.there(site):
            before = set(self.sent)
            yield lambda: before.isdisjoint(self.sent)
            generation = self.meeting.generation
            self.meeting.join(met=1)
            yield lambda: self.meeting.generation != generation

    def end_warp(self):
        super().end_warp()
        self.meeting.join(ended=1)


class Pair:
    """A cluster of two. `works`: the pieces of each, the same blocks for other rows. `options`: as ThreadBlock's."""

    def __init__(self, works, **options):
        self.events = Events()
        self.blocks = [PairedBlock(rank, self.events, pieces=pieces, **options) for rank, pieces in enumerate(works)]
        meeting = Meeting(sum(block.warps for block in self.blocks))
        for block, other in zip(self.blocks, self.blocks[::-1], strict=True):
            block.other, block.meeting = other, meeting

    def run(self, choose):
        for block in self.blocks:
            block.launch()
        self.events.run(choose)
