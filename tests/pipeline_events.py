"""What goes on in a model of the forward kernel, one event at a time, and the barriers that it waits at,
with the stages that they are for: for pipeline_model.py and pipeline_pair.py.
"""

from dataclasses import dataclass


class Deadlock(Exception):
    """Everybody waits."""


class Hazard(Exception):
    """Shared memory or a barrier is not in the state that someone relies on."""


def expect(condition, otherwise):
    if not condition:
        raise Hazard(otherwise)


@dataclass
class Barrier:
    """mbarrier: a phase ends when its arrivals and its announced copies are in. A copy may land before it is announced,
    which counts below zero."""

    count: int
    pending: int | None = None  # while there is no barrier: not made yet, or its thread block has ended
    copies: int = 0
    phase: int = 0

    def exists(self):
        expect(self.pending is not None, "a barrier that is not made, or whose thread block has ended")

    def update(self, arrivals=0, copies=0):
        self.exists()
        self.pending -= arrivals
        self.copies += copies
        expect(self.pending >= 0, "more arrivals than the barrier was made for")
        if self.pending == 0 and self.copies == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity):
        """try_wait.parity: true once the phase of that parity has ended, and until the one after it has."""
        self.exists()
        return lambda: self.phase % 2 != parity


@dataclass
class NamedBarrier:
    """bar.sync of one warpgroup, with bar.arrive of another where `arrivals_expected`; or a warp's __syncwarp."""

    syncs_expected: int
    arrivals_expected: int = 0
    syncs: int = 0
    arrivals: int = 0
    generation: int = 0

    def join(self, syncs=0, arrivals=0):
        self.syncs, self.arrivals = self.syncs + syncs, self.arrivals + arrivals
        if self.syncs + self.arrivals == self.syncs_expected + self.arrivals_expected:
            expect(self.syncs == self.syncs_expected, "a turn was passed twice before it was taken")
            self.syncs, self.arrivals, self.generation = 0, 0, self.generation + 1

    def sync(self):
        generation = self.generation
        self.join(syncs=1)
        return lambda: self.generation != generation


@dataclass
class Ring:
    size: int
    count: int = 0

    @property
    def stage(self):
        return self.count % self.size

    @property
    def parity(self):
        return self.count // self.size % 2


class Pipe:
    """Stages of one operand, with their barriers."""

    def __init__(self, size, readers, writers=1):
        self.full = [Barrier(writers) for _ in range(size)]
        self.empty = [Barrier(readers) for _ in range(size)]
        self.content = [None] * size


class Events:
    """What goes on next: an actor, or one of the copies, products and arrivals under way, which end in any order."""

    def __init__(self):
        self.actors = {}  # name -> its generator, and whether it can go on
        self.under_way = []  # what happens when each is done

    def run(self, choose):
        """Until all actors have ended. `choose(n)` is one of n."""
        while self.actors:
            ready = [(name, actor) for name, (actor, can_go_on) in self.actors.items() if can_go_on()]
            if not ready and not self.under_way:
                raise Deadlock(f"{', '.join(self.actors)} wait")
            which = choose(len(ready) + len(self.under_way))
            if which >= len(ready):
                self.under_way.pop(which - len(ready))()
                continue
            name, actor = ready[which]
            try:
                self.actors[name] = actor, next(actor)
            except StopIteration:
                del self.actors[name]
        expect(not self.under_way, "something lands after its thread block has ended")
