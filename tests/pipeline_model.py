"""The forward kernel's barrier protocol as a discrete-event model, for test_pipeline_model.py.

Producer.load, Consumer.attend and the constructors of src/kernels/forward_{load,mma}.cuh, line by line, as generators
that yield what they wait for. A scheduler lets one warp or one copy go on at a time, so that any of them may be
arbitrarily slow. Whoever reads a stage of shared memory checks that it holds, and goes on holding, what it expects.
"""

from dataclasses import dataclass

STAGES, TILE_SLOTS, WARPS = 2, 2, 2  # as the kernel, but for two warps a warpgroup in place of four: enough to race


class Deadlock(Exception):
    """Everybody waits."""


@dataclass
class Barrier:
    """mbarrier: a phase ends when its arrivals and its announced copies are in."""

    count: int
    pending: int = 0
    copies: int = 0
    phase: int = 0

    def __post_init__(self):
        self.pending = self.count

    def update(self, arrivals=0, copies=0):
        self.pending -= arrivals
        self.copies += copies
        assert self.pending >= 0, "more arrivals than the barrier was made for"
        if self.pending == 0 and self.copies == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity):
        """try_wait.parity: true once the phase of that parity has ended, and until the one after it has."""
        return lambda: self.phase % 2 != parity


@dataclass
class NamedBarrier:
    """bar.sync of one warpgroup with bar.arrive of the one before it."""

    syncs: int = 0
    arrivals: int = 0
    generation: int = 0

    def join(self, syncs=0, arrivals=0):
        self.syncs, self.arrivals = self.syncs + syncs, self.arrivals + arrivals
        if self.syncs + self.arrivals == 2 * WARPS:
            assert self.syncs == self.arrivals == WARPS, "a turn was passed twice before it was taken"
            self.syncs, self.arrivals, self.generation = 0, 0, self.generation + 1

    def sync(self):
        generation = self.generation
        self.join(syncs=1)
        return lambda: self.generation != generation


@dataclass
class Ring:
    size: int
    stage: int = 0
    parity: int = 0

    def advance(self):
        self.stage += 1
        if self.stage == self.size:
            self.stage, self.parity = 0, self.parity ^ 1


class Pipe:
    """Stages of one operand, with their barriers."""

    def __init__(self, size, readers):
        self.full = [Barrier(1) for _ in range(size)]
        self.empty = [Barrier(readers) for _ in range(size)]
        self.content = [None] * size


class ThreadBlock:
    """`tiles` of (first_block, end_block, ranges): own (begin, end) of each warpgroup, None where it has no rows."""

    def __init__(self, consumers, tiles):
        self.consumers, self.tiles = consumers, tiles
        warps = consumers * WARPS
        self.k, self.v, self.slots = Pipe(STAGES, warps), Pipe(STAGES, warps), Pipe(TILE_SLOTS, warps)
        self.q = [Pipe(1, WARPS) for _ in range(consumers)]
        self.turn = [NamedBarrier() for _ in range(consumers)]
        self.copies = []  # under way: they land in any order

    def producer(self):
        k_ring, v_ring, slots, q_parity = Ring(STAGES), Ring(STAGES), Ring(TILE_SLOTS), 0

        def load(pipe, stage, parity, value):
            yield pipe.empty[stage].passed(parity ^ 1)
            pipe.full[stage].update(arrivals=1, copies=1)
            pipe.content[stage] = "half written"
            self.copies.append((pipe, stage, value))

        def load_block(pipe, ring, tile, block):
            yield from load(pipe, ring.stage, ring.parity, (tile, block))
            ring.advance()

        for index, tile in enumerate([*self.tiles, None]):
            yield self.slots.empty[slots.stage].passed(slots.parity ^ 1)
            self.slots.content[slots.stage] = (index, tile)
            self.slots.full[slots.stage].update(arrivals=1)
            slots.advance()
            if tile is None or tile[0] == tile[1]:
                continue
            first, n_block = tile[0], tile[1] - 1
            yield from load_block(self.k, k_ring, index, n_block)
            for q in self.q:
                yield from load(q, 0, q_parity, index)
            q_parity ^= 1
            while n_block > first:
                yield from load_block(self.k, k_ring, index, n_block - 1)
                yield from load_block(self.v, v_ring, index, n_block)
                n_block -= 1
            yield from load_block(self.v, v_ring, index, n_block)

    def consumer(self, w):
        k_ring, v_ring, slots, q_parity = Ring(STAGES), Ring(STAGES), Ring(TILE_SLOTS), 0
        q, mine, following = self.q[w], self.turn[w], self.turn[(w + 1) % self.consumers]

        def read(pipe, stage, expected):
            """A product: the stage must hold the block from when it is issued until it is done."""
            assert pipe.content[stage] == expected
            yield lambda: True
            assert pipe.content[stage] == expected, "overwritten while it was read"

        def release(pipe, ring):
            pipe.empty[ring.stage].update(arrivals=1)
            ring.advance()

        def skip_blocks(blocks, last_has_no_turn):
            for block in blocks:
                yield self.k.full[k_ring.stage].passed(k_ring.parity)
                release(self.k, k_ring)
                yield self.v.full[v_ring.stage].passed(v_ring.parity)
                release(self.v, v_ring)
                if last_has_no_turn and block == blocks[-1]:
                    break
                yield mine.sync()
                following.join(arrivals=1)

        if w == self.consumers - 1:
            following.join(arrivals=1)
        while True:
            yield self.slots.full[slots.stage].passed(slots.parity)
            index, tile = self.slots.content[slots.stage]
            if tile is None:
                break
            first, end, ranges = tile
            if first != end:
                own_first, own_end = ranges[w] or (first, first)
                yield from skip_blocks(range(end - 1, own_end - 1, -1), own_first == own_end)
                yield q.full[0].passed(q_parity)
                if own_first != own_end:
                    yield self.k.full[k_ring.stage].passed(k_ring.parity)
                    yield from read(q, 0, index)
                    yield from read(self.k, k_ring.stage, (index, own_end - 1))
                    release(self.k, k_ring)
                    for block in range(own_end - 2, own_first - 1, -1):
                        yield self.k.full[k_ring.stage].passed(k_ring.parity)
                        yield self.v.full[v_ring.stage].passed(v_ring.parity)
                        yield mine.sync()
                        following.join(arrivals=1)
                        yield from read(q, 0, index)
                        yield from read(self.v, v_ring.stage, (index, block + 1))
                        yield from read(self.k, k_ring.stage, (index, block))
                        release(self.k, k_ring)
                        release(self.v, v_ring)
                    q.empty[0].update(arrivals=1)
                    yield self.v.full[v_ring.stage].passed(v_ring.parity)
                    yield from read(self.v, v_ring.stage, (index, own_first))
                    release(self.v, v_ring)
                else:
                    q.empty[0].update(arrivals=1)
                q_parity ^= 1
                yield from skip_blocks(range(own_first - 1, first - 1, -1), False)
            assert self.slots.content[slots.stage] == (index, tile)
            release(self.slots, slots)
        if w == 0:
            yield mine.sync()

    def land_copy(self, which):
        pipe, stage, value = self.copies.pop(which)
        pipe.content[stage] = value
        pipe.full[stage].update(copies=-1)

    def run(self, choose):
        """`choose(n)` is one of n: what goes on next."""
        warps = {"producer": self.producer()}
        warps |= {f"warp {i} of warpgroup {w}": self.consumer(w) for w in range(self.consumers) for i in range(WARPS)}
        waiting = {name: lambda: True for name in warps}
        while warps:
            ready = [name for name in warps if waiting[name]()]
            if not ready and not self.copies:
                raise Deadlock(f"{', '.join(warps)} wait, in tiles {self.tiles}")
            which = choose(len(ready) + len(self.copies))
            if which >= len(ready):
                self.land_copy(which - len(ready))
                continue
            try:
                waiting[ready[which]] = next(warps[ready[which]])
            except StopIteration:
                del warps[ready[which]]
        assert all(turn.syncs == turn.arrivals == 0 for turn in self.turn), "turns are left over at the end"
