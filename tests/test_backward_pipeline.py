"""Who waits for whom in the backward kernel, as a model: every order of events gives the right data, without a
deadlock, and leaving out any one wait goes wrong.

The roles do what src/kernels/backward_load.cuh and backward_mma.cuh do, barrier by barrier; a consumer warpgroup is one
actor. What a product or the copy engine reads is held from its issue until the wait that ends it.
"""

import random

import pytest

CONSUMERS, STAGES = 2, 2


class Wrong(AssertionError):
    """Data was overwritten too early, or not there yet."""


class Barrier:
    def __init__(self, arrivals):
        self.arrivals, self.pending, self.phase = arrivals, arrivals, 0

    def arrive(self):
        self.pending -= 1
        if self.pending == 0:
            self.pending, self.phase = self.arrivals, self.phase + 1

    def passed(self, parity):
        return self.phase % 2 != parity


class Buffer:
    """Holds `parts` pieces that are written on their own; each is a number of a step."""

    def __init__(self, parts=1):
        self.content, self.readers = [None] * parts, 0

    def write(self, step, part=0):
        if self.readers:
            raise Wrong("written while it is read")
        self.content[part] = step

    def read(self, step):
        if self.content != [step] * len(self.content):
            raise Wrong(f"read for step {step}, but it holds {self.content}")
        self.readers += 1

    def done(self):
        self.readers -= 1


class Model:
    def __init__(self, steps, without=None):
        self.steps, self.without = steps, without
        self.q, self.dout = ([Buffer() for _ in range(STAGES)] for _ in range(2))
        self.ds = [Buffer(CONSUMERS) for _ in range(2)]
        self.dq = [Buffer() for _ in range(CONSUMERS)]
        self.full = {name: [Barrier(1) for _ in range(STAGES)] for name in ("q", "dout")}
        self.empty = {name: [Barrier(CONSUMERS) for _ in range(STAGES)] for name in ("q", "dout")}
        self.ds_full = [Barrier(CONSUMERS) for _ in range(2)]
        self.dq_full, self.dq_empty = ([Barrier(1) for _ in range(CONSUMERS)] for _ in range(2))
        self.asked = {"q": [], "dout": []}
        self.added = [[] for _ in range(CONSUMERS)]

    def wait(self, name, barrier, parity):
        while name != self.without and not barrier.passed(parity):
            yield barrier
        yield None

    def loader(self):
        for step in range(self.steps):
            stage, parity = step % STAGES, step // STAGES % 2
            for name, buffers in (("q", self.q), ("dout", self.dout)):
                yield from self.wait(f"{name}_empty", self.empty[name][stage], parity ^ 1)
                buffers[stage].write(None)
                self.asked[name].append(step)

    def copy_engine(self, name, buffers):
        """Brings what was asked for, in its own time."""
        for step in range(self.steps):
            while step not in self.asked[name]:
                yield "nothing asked for"
            yield None
            buffers[step % STAGES].write(step)
            self.full[name][step % STAGES].arrive()

    def consumer(self, w):
        def multiply_ds(step):
            """dQ of the step before, and its way to the adder."""
            buffer = self.ds[(step + 1) % 2]
            if step > 0:
                yield from self.wait("ds_full", self.ds_full[(step - 1) % 2], (step - 1) // 2 % 2)
            yield from self.wait("dq_empty", self.dq_empty[w], step % 2 ^ 1)
            if step > 0:
                buffer.read(step - 1)
            yield None
            if step > 0:
                buffer.done()
            self.dq[w].write(step - 1)
            self.dq_full[w].arrive()

        for step in range(self.steps):
            stage, parity = step % STAGES, step // STAGES % 2
            yield from self.wait("q_full", self.full["q"][stage], parity)
            self.q[stage].read(step)  # S
            yield None
            yield from multiply_ds(step)
            yield from self.wait("dout_full", self.full["dout"][stage], parity)
            self.dout[stage].read(step)  # dP and dV
            yield None
            self.ds[step % 2].write(step, w)
            self.ds_full[step % 2].arrive()
            yield None
            self.q[stage].done()  # dK
            self.empty["q"][stage].arrive()
            yield None
            self.dout[stage].done()
            self.empty["dout"][stage].arrive()
        yield from multiply_ds(self.steps)

    def adder(self, w):
        yield from self.wait("dq_full", self.dq_full[w], 0)
        self.dq_empty[w].arrive()
        for step in range(self.steps):
            yield from self.wait("dq_full", self.dq_full[w], (step + 1) % 2)
            self.dq[w].read(step)
            yield None
            self.dq[w].done()
            self.added[w].append(step)
            self.dq_empty[w].arrive()

    def run(self, seed):
        rng = random.Random(seed)
        actors = [self.loader(), self.copy_engine("q", self.q), self.copy_engine("dout", self.dout),
                  *(role(w) for role in (self.consumer, self.adder) for w in range(CONSUMERS))]
        idle = 0
        while actors:
            actor = rng.choice(actors)
            for _ in range(rng.choice([1, 1, 5, 30])):  # some run ahead as far as they can
                try:
                    blocked = next(actor)
                except StopIteration:
                    actors.remove(actor)
                    idle = 0
                    break
                idle = idle + 1 if blocked else 0
                if idle > 5000:
                    raise Wrong("deadlock")
        assert self.added == [list(range(self.steps))] * CONSUMERS


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_every_order_is_right(steps):
    for seed in range(150):
        Model(steps).run(seed)


@pytest.mark.parametrize("wait", ["q_empty", "dout_empty", "q_full", "dout_full", "ds_full", "dq_full", "dq_empty"])
def test_each_wait_is_needed(wait):
    with pytest.raises(AssertionError):
        for seed in range(300):
            Model(9, without=wait).run(seed)
