"""Who waits for whom in the backward kernel, as a model: every order of events gives the right data, without a
deadlock, and leaving out any one wait goes wrong.

The roles do what src/kernels/backward_load.cuh and backward_mma.cuh do, barrier by barrier; a consumer warpgroup is one
actor. What a product or the copy engine reads is held from its issue until the wait that ends it.

Consumers have keys of their own, or, in pairs of thread blocks, the same: then the first makes P and dV, the second dS
and dK. Both thread blocks go through the same steps, and make each step's dQ of the dS of both.

A thread block has several pieces of work, one after the other, each with so many steps; steps are numbered through.
"""

import random

import pytest

CONSUMERS, STAGES = 2, 2
PLACES = 2  # for pieces of work
END, ROWS = -1, -2


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
    def __init__(self, pieces, without=None, pairs=False, parts=1):
        self.pieces, self.steps, self.without = pieces, sum(pieces), without
        self.stages = {"q": STAGES, "dout": 1 if pairs else STAGES}
        self.parts = parts  # in which dQ is handed over
        self.pairs, self.other, self.rank = pairs, None, 0
        self.mail, self.told, self.known = Buffer(), Barrier(1), Barrier(1)
        self.other_ds, self.other_ds_full = Buffer(), Barrier(1)
        self.q, self.dout = ([Buffer() for _ in range(self.stages[name])] for name in ("q", "dout"))
        self.k, self.v = Buffer(), Buffer()  # what they hold is the number of a piece
        self.keys_full = {name: Barrier(1) for name in "kv"}
        self.keys_empty = {name: Barrier(CONSUMERS) for name in "kv"}
        self.places = [Buffer() for _ in range(PLACES)]
        self.place_full = [Barrier(1) for _ in range(PLACES)]
        self.place_empty = [Barrier(2 * CONSUMERS + pairs) for _ in range(PLACES)]
        self.ds = [Buffer(1 if pairs else CONSUMERS) for _ in range(2)]
        self.p, self.p_full, self.p_empty = Buffer(), Barrier(1), Barrier(1)
        self.dq = [Buffer() for _ in range(CONSUMERS)]
        self.full = {name: [Barrier(1) for _ in range(stages)] for name, stages in self.stages.items()}
        self.empty = {name: [Barrier(CONSUMERS) for _ in range(stages)] for name, stages in self.stages.items()}
        self.ds_full = [Barrier(1 if pairs else CONSUMERS) for _ in range(2)]
        self.ds_empty = [Barrier(CONSUMERS * (2 if pairs else 1)) for _ in range(2)]
        self.dq_full, self.dq_empty = ([Barrier(1) for _ in range(CONSUMERS)] for _ in range(2))
        self.asked = {"q": [], "dout": [], "k": [], "v": [], "ds": []}
        self.added = [[] for _ in range(CONSUMERS)]

    def wait(self, name, barrier, parity):
        while name != self.without and not barrier.passed(parity):
            yield barrier
        yield None

    def place(self, name, step):
        """Stage and parity."""
        return step % self.stages[name], step // self.stages[name] % 2

    def full_at(self, name, step):
        stage, parity = self.place(name, step)
        yield from self.wait(f"{name}_full", self.full[name][stage], parity)

    def release(self, name, buffers, step):
        stage, _ = self.place(name, step)
        buffers[stage].done()
        self.empty[name][stage].arrive()

    def put(self, piece, content):
        yield from self.wait("place_empty", self.place_empty[piece % PLACES], piece // PLACES % 2 ^ 1)
        self.places[piece % PLACES].write(content)
        self.place_full[piece % PLACES].arrive()

    def take(self, piece):
        yield from self.wait("place_full", self.place_full[piece % PLACES], piece // PLACES % 2)
        self.places[piece % PLACES].read(piece if piece < len(self.pieces) else END)

    def give_back(self, piece):
        self.places[piece % PLACES].done()
        self.place_empty[piece % PLACES].arrive()

    def steps_of(self, piece):
        first = sum(self.pieces[:piece])
        return range(first, first + self.pieces[piece])

    def put_for_both(self, piece, content):
        if self.rank == 1:
            yield from self.wait("told", self.told, piece % 2)
            self.mail.read(content)
            yield None
            self.mail.done()
            self.other.known.arrive()
        yield from self.put(piece, content)
        if self.pairs and self.rank == 0:
            yield from self.wait("known", self.known, piece % 2 ^ 1)
            self.other.mail.write(content)
            self.other.told.arrive()

    def loader(self):
        for piece in range(len(self.pieces)):
            yield from self.put_for_both(piece, piece)
            steps = self.steps_of(piece)
            for step in steps:
                yield from self.ask_for_queries(step)
                if step == steps[0]:
                    yield from self.ask_for_keys(piece)
            if not steps:
                yield from self.ask_for_keys(piece)
        yield from self.put_for_both(len(self.pieces), END)

    def ask_for_queries(self, step):
        for name, buffers in (("q", self.q), ("dout", self.dout)):
            stage, parity = self.place(name, step)
            yield from self.wait(f"{name}_empty", self.empty[name][stage], parity ^ 1)
            buffers[stage].write(None)
            self.asked[name].append(step)

    def ask_for_keys(self, piece):
        for name, buffer in (("v", self.v), ("k", self.k)):
            yield from self.wait(f"{name}_empty", self.keys_empty[name], piece % 2 ^ 1)
            buffer.write(None)
            self.asked[name].append(piece)

    def keys_engine(self, name, buffer):
        for piece in range(len(self.pieces)):
            while piece not in self.asked[name]:
                yield "nothing asked for"
            yield None
            buffer.write(piece)
            self.keys_full[name].arrive()

    def copy_engine(self, name, buffers):
        """Brings what was asked for, in its own time."""
        for step in range(self.steps):
            while step not in self.asked[name]:
                yield "nothing asked for"
            yield None
            stage, _ = self.place(name, step)
            buffers[stage].write(step)
            self.full[name][stage].arrive()

    def sender(self):
        """dS of each step to the other thread block."""
        for piece in range(len(self.pieces)):
            yield from self.take(piece)
            self.give_back(piece)
            for step in self.steps_of(piece):
                yield from self.wait("sender: ds_full", self.ds_full[step % 2], step // 2 % 2)
                if step > 0:
                    yield from self.wait("sender: ds_empty", self.ds_empty[(step - 1) % 2], (step - 1) // 2 % 2)
                self.ds[step % 2].read(step)
                self.other.other_ds.write(None)
                self.asked["ds"].append(step)
                yield None
        yield from self.take(len(self.pieces))

    def ds_engine(self):
        for step in range(self.steps):
            while step not in self.asked["ds"]:
                yield "nothing asked for"
            yield None
            self.ds[step % 2].done()
            self.other.other_ds.write(step)
            self.other.other_ds_full.arrive()

    def keys_at(self, piece):
        for name, buffer in (("k", self.k), ("v", self.v)):
            yield from self.wait(f"{name}_full", self.keys_full[name], piece % 2)
            buffer.read(piece)

    def release_keys(self, name, buffer):
        buffer.done()
        self.keys_empty[name].arrive()

    def multiply_ds(self, w, step, call):
        """dQ of a step, and its way to the adder; a piece's first call has none of it."""
        if step is not None:
            yield from self.wait("ds_full", self.ds_full[step % 2], step // 2 % 2)
            if self.pairs:
                yield from self.wait("other_ds_full", self.other_ds_full, step % 2)
        yield from self.wait("dq_empty", self.dq_empty[w], call * self.parts % 2 ^ 1)
        read = [] if step is None else [self.ds[step % 2], self.other_ds] if self.pairs else [self.ds[step % 2]]
        for buffer in read:
            buffer.read(step)
        yield None
        for buffer in read:
            buffer.done()
        if step is not None:
            self.ds_empty[step % 2].arrive()
            if self.pairs:
                self.other.ds_empty[step % 2].arrive()
        for part in range(self.parts):
            if part > 0:
                yield from self.wait("dq_empty", self.dq_empty[w], (call * self.parts + part) % 2 ^ 1)
            self.dq[w].write(step)
            self.dq_full[w].arrive()

    def consumer(self, w, take_step):
        for piece in range(len(self.pieces)):
            yield from self.take(piece)
            yield from self.keys_at(piece)
            before = None
            for step in self.steps_of(piece):
                yield from take_step(w, step, before, step + piece)
                before = step
            self.release_keys("v", self.v)
            yield from self.multiply_ds(w, before, sum(self.pieces[:piece + 1]) + piece)
            self.release_keys("k", self.k)
            if self.pairs:  # rows are staged where dQ was
                handed = sum(self.pieces[:piece + 1]) + piece + 1
                yield from self.wait("dq_empty, rows", self.dq_empty[w], handed * self.parts % 2 ^ 1)
                self.dq[w].write(ROWS)
            yield None
            self.give_back(piece)
        yield from self.take(len(self.pieces))

    def step(self, w, step, before, call):
        yield from self.full_at("q", step)
        yield from self.full_at("dout", step)
        self.q[step % STAGES].read(step)  # S
        self.dout[step % STAGES].read(step)  # dP
        yield None
        yield from self.wait("ds_empty", self.ds_empty[step % 2], step // 2 % 2 ^ 1)
        self.ds[step % 2].write(step, w)
        self.ds_full[step % 2].arrive()
        yield from self.multiply_ds(w, before, call)
        yield None
        self.release("q", self.q, step)  # dK
        self.release("dout", self.dout, step)  # dV

    def values_step(self, w, step, before, call):
        yield from self.full_at("q", step)
        self.q[step % STAGES].read(step)  # S
        yield None
        self.release("q", self.q, step)
        yield from self.wait("p_empty", self.p_empty, step % 2 ^ 1)
        self.p.write(step)
        self.p_full.arrive()
        yield None
        yield from self.full_at("dout", step)
        self.dout[0].read(step)  # dV
        yield from self.multiply_ds(w, before, call)
        yield None
        self.release("dout", self.dout, step)

    def keys_step(self, w, step, before, call):
        yield from self.full_at("q", step)
        yield from self.full_at("dout", step)
        self.dout[0].read(step)  # dP
        yield None
        yield from self.wait("p_full", self.p_full, step % 2)
        self.p.read(step)
        yield None
        self.p.done()
        self.p_empty.arrive()
        yield None
        self.release("dout", self.dout, step)
        yield from self.wait("ds_empty", self.ds_empty[step % 2], step // 2 % 2 ^ 1)
        self.ds[step % 2].write(step)
        self.ds_full[step % 2].arrive()
        self.q[step % STAGES].read(step)  # dK
        yield from self.multiply_ds(w, before, call)
        yield None
        self.release("q", self.q, step)

    def adder(self, w):
        handed = 0
        for piece in range(len(self.pieces)):
            yield from self.take(piece)
            for step in [None, *self.steps_of(piece)]:
                for _ in range(self.parts):
                    yield from self.wait("dq_full", self.dq_full[w], handed % 2)
                    handed += 1
                    if step is not None:
                        self.dq[w].read(step)
                        yield None
                        self.dq[w].done()
                        self.added[w].append(step)
                    self.dq_empty[w].arrive()
            self.give_back(piece)
        yield from self.take(len(self.pieces))

    def actors(self):
        actors = [self.loader(), self.copy_engine("q", self.q), self.copy_engine("dout", self.dout),
                  self.keys_engine("k", self.k), self.keys_engine("v", self.v),
                  *(self.adder(w) for w in range(CONSUMERS))]
        if self.pairs:
            return [*actors, self.sender(), self.ds_engine(),
                    self.consumer(0, self.values_step), self.consumer(1, self.keys_step)]
        return actors + [self.consumer(w, self.step) for w in range(CONSUMERS)]

    def check(self):
        assert self.added == [[step for step in range(self.steps) for _ in range(self.parts)]] * CONSUMERS


def run(pieces, seed, without=None, pairs=False, parts=1):
    """One thread block, or two, with all of their actors in any order."""
    blocks = [Model(pieces, without, pairs, parts) for _ in range(1 + pairs)]
    for rank, block in enumerate(blocks):
        block.rank, block.other = rank, blocks[rank - 1]
    rng = random.Random(seed)
    actors = [actor for block in blocks for actor in block.actors()]
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
    for block in blocks:
        block.check()


KINDS = [(False, 1), (True, 1), (True, 2)]


@pytest.mark.parametrize(("pairs", "parts"), KINDS)
@pytest.mark.parametrize("pieces", [[1], [2], [9], [3, 1, 4], [0, 2, 0, 0, 1], [1, 1, 1, 1], []])
def test_every_order_is_right(pieces, pairs, parts):
    for seed in range(150):
        run(pieces, seed, pairs=pairs, parts=parts)


WAITS = ["q_empty", "q_full", "dout_full", "ds_full", "dq_full", "dq_empty", "k_empty", "k_full", "v_empty", "v_full",
         "place_empty", "place_full", "ds_empty"]


# Consumers with keys of their own give Q and dO back at once, so that one of the two waits would do for the loader.
WAITS_OF_PAIRS = ["dout_empty", "p_full", "p_empty", "dq_empty, rows", "other_ds_full", "sender: ds_full",
                  "sender: ds_empty", "told", "known"]


@pytest.mark.parametrize(("wait", "pairs", "parts"), [
    (wait, pairs, parts) for pairs, parts in KINDS for wait in WAITS + (WAITS_OF_PAIRS if pairs else [])])
def test_each_wait_is_needed(wait, pairs, parts):
    with pytest.raises(AssertionError):
        for seed in range(300):
            run([4, 1, 5, 0, 0, 0, 3], seed, without=wait, pairs=pairs, parts=parts)
