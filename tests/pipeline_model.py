"""The forward kernel's barrier protocol as a discrete-event model, for test_pipeline_model.py.

Scheduler::run, Loader::run, Transposer::run, Consumer::attend, Exchange, RowWriter::put and what the kernel does around
them (src/kernels/forward_{tiles,load,transpose,mma,exchange,epilogue,kernel}.cuh), step by step, as generators that
yield what they wait for. A scheduler of events lets one warp, one lane, one copy or one product go on at a time, so
that any of them may be arbitrarily slow. Whoever reads shared memory checks that it holds, and goes on holding, what it
expects; whoever uses a barrier, that it is made and its thread block has not ended.

Each wait, arrival and sync has a name; ThreadBlock can be told to leave one out, to see that the model notices. Two
thread blocks that share keys and values are in pipeline_pair.py.
"""

from dataclasses import dataclass, field

from pipeline_events import Barrier, Events, NamedBarrier, Pipe, Ring, expect

STAGES, TILE_SLOTS, LEAD = 2, 4, 2  # as the kernel
TRANSPOSERS, GATHERERS = 2, 3
LATER = 2  # blocks of a gathering loader on their way while an older one is waited for
WARPS, LANES = 2, 2  # of a warpgroup, of a warp, in place of 4 and 32: enough to race
GROUPS = 2  # of 64 columns, as an output of head dim 128 is staged
SITES = set()  # names of all waits, arrivals and syncs, as they are met


@dataclass(frozen=True)
class Piece:
    """A piece of work: the blocks [first, end) are loaded, each group of rows has its own of them (begin, end), empty
    ones at `first`."""

    first: int
    end: int
    own: tuple = field(default=())
    cut: bool = False  # the last block holds rows past the sequence's keys, which its readers clear for themselves
    joiners: frozenset | None = None  # of a part: the warpgroups that find all parts there; None: not split
    skipped: int = 0  # indices before its own that have no queries


class ThreadBlock:
    """One thread block with its pieces of work. `counted`: their indices come from a counter. `idle_rows`: a tile has
    rows that no query is loaded to. `has_qv`: two warpgroups share their rows, read values for their scores too, and
    tell each other of these. `eight_bits`: values are turned on their way, or have been `turned` before. `third_keys`:
    K has a stage more than V. `values_early`: values are given back before the products are done, and asked for before
    keys (Traits::kValuesEarly). `keys_first`: a block's scores are done, and its keys given back, before the values of
    the block before are waited for (Traits::kKeysFirst). `gathers`: rows come by ordinary copies, of as many loaders as
    there are warps for it. `left_out`: the name of a wait, arrival or sync that is not there."""

    name = ""
    copies_of_block = 1  # of keys or values, that land each on their own

    def __init__(self, consumers, pieces, query_stages=1, counted=False, idle_rows=False, has_qv=False,
                 eight_bits=False, third_keys=False, turned=False, values_early=False, keys_first=False, gathers=False,
                 left_out=None, events=None):
        self.events = events or Events()
        self.consumers, self.pieces, self.left_out = consumers, pieces, left_out
        self.has_qv, self.row_groups = has_qv, 1 if has_qv else consumers
        self.eight_bits, self.two_parts = eight_bits, has_qv and eight_bits
        self.values_early, self.keys_first = values_early, keys_first
        self.takes_turns = not has_qv and not eight_bits and consumers > 1
        self.query_stages, self.counted, self.idle_rows = query_stages, counted, idle_rows
        self.ahead = TILE_SLOTS
        warps = consumers * WARPS
        self.transposers = transposers = TRANSPOSERS if eight_bits and not turned else 0
        self.key_stages = STAGES + third_keys
        self.gathers, self.later = gathers, 0 if has_qv or self.takes_turns else LATER
        self.loaders = loaders = GATHERERS if gathers and not transposers else 1
        self.k, self.v = Pipe(self.key_stages, warps, loaders), Pipe(STAGES, warps, transposers or loaders)
        self.loaded_v = Pipe(STAGES, transposers + (warps if has_qv else 0)) if transposers else self.v
        self.slots = Pipe(TILE_SLOTS, warps + loaders + transposers)
        self.scaled, self.scales = [Barrier(1) for _ in range(TILE_SLOTS)], [None] * TILE_SLOTS
        self.q = [Pipe(query_stages, warps // self.row_groups) for _ in range(self.row_groups)]
        self.pair = [NamedBarrier(syncs_expected=2) for _ in range(WARPS)]  # a warp of each warpgroup
        self.both = NamedBarrier(syncs_expected=2 * WARPS)
        self.letters = {}  # (box, warp) -> the letter there that is not read yet: (piece, block, first or second, from)
        self.in_registers = {}  # piece -> (warpgroup, warp) that have their part of Q
        self.staging = 0  # warps that write rows
        self.nearly_loaded = Barrier(1)
        self.asked = -1, 0  # the piece that the loader is at, and how many of its blocks of K it has not asked for
        self.made = NamedBarrier(syncs_expected=1, arrivals_expected=1)
        self.begun = NamedBarrier(syncs_expected=warps + loaders + transposers)
        self.warps = warps + 1 + loaders + transposers  # that have not ended
        self.turn = [NamedBarrier(WARPS, arrivals_expected=WARPS) for _ in range(consumers)]
        self.own_barrier = [NamedBarrier(WARPS) for _ in range(consumers)]
        self.gathered = {}  # (pipe, stage) -> the loaders whose share of the block there has come, and the block
        self.turned = {}  # stage of V -> the transposers that have turned their share of the block there
        self.cleared = {}  # (stage of V, warpgroup) -> warps that cleared their share of the block there
        self.idle_cleared = {}  # (stage of Q, warpgroup) -> warps that cleared their share of the idle rows there
        self.left = {}  # (warpgroup, piece) -> warps that left their rows of it
        self.counted_parts = {}  # warpgroup -> the last piece whose part it counted

    def barriers(self):
        pipes = self.k, self.v, self.loaded_v, self.slots, *self.q
        return *(b for pipe in pipes for b in (*pipe.full, *pipe.empty)), *self.scaled, self.nearly_loaded

    def there(self, site):
        SITES.add(site)
        return site != self.left_out

    def wait(self, site, barrier, parity):
        if self.there(site):
            yield barrier.passed(parity)

    def arrive(self, site, barrier, **announced):
        if self.there(site):
            barrier.update(arrivals=1, **announced)

    def sync(self, site, barrier):
        if self.there(site):
            yield barrier.sync()

    def meet(self, site):
        """Wait for the other thread block, where there is one."""
        return iter(())

    def begin(self, makes_barriers=False):
        """What all warps but the scheduler do first."""
        if makes_barriers:
            yield lambda: True
            for barrier in self.barriers():
                barrier.pending = barrier.count
            if self.there("consumer: barriers are made"):
                self.made.join(arrivals=1)
        yield from self.sync("others: barriers are made", self.begun)
        yield from self.meet("the other's barriers are made")

    def take_index(self, count):
        """From a counter: not before the loader is nearly done with the piece before. It may wait for that anew."""
        if self.counted and count > 0:
            yield from self.wait("scheduler: nearly loaded", self.nearly_loaded, (count - 1) % 2)
            at, left = self.asked
            expect(at == count - 1 and left <= LEAD, "taken while another thread block could do it sooner")

    def scheduler(self):
        for count, piece in enumerate([*self.pieces, None]):
            if count > 0:
                yield from self.take_index(count)
            if count >= self.ahead:
                before = Ring(TILE_SLOTS, count - self.ahead)
                yield from self.wait("scheduler: slot given back", self.slots.empty[before.stage], before.parity)
            for _ in range(piece.skipped if piece else 0):
                yield from self.take_index(count)
            slot = Ring(TILE_SLOTS, count).stage
            self.slots.content[slot] = (count, piece)
            if count == 0:
                yield from self.sync("scheduler: barriers are made", self.made)
                yield from self.meet("the other's barriers are made")
            self.arrive("scheduler: slot filled", self.slots.full[slot])
            if self.eight_bits and not self.transposers:
                yield from self.find_descales("scheduler", count)

    def find_descales(self, who, count):
        yield lambda: True  # memory answers late
        slot = Ring(TILE_SLOTS, count).stage
        self.scales[slot] = count
        self.arrive(f"{who}: slot scaled", self.scaled[slot])

    def next_piece(self, who, tiles):
        yield from self.wait(f"{who}: slot filled", self.slots.full[tiles.stage], tiles.parity)
        content = self.slots.content[tiles.stage]
        expect(content is not None and content[0] == tiles.count, "a slot with another piece of work")
        return content[1]

    def read_slot(self, tiles, piece):
        expect(self.slots.content[tiles.stage] == (tiles.count, piece), "a slot was overwritten while it was used")

    def give_slot_back(self, who, tiles, piece):
        self.read_slot(tiles, piece)
        self.arrive(f"{who}: slot given back", self.slots.empty[tiles.stage])
        tiles.count += 1

    def wait_for_other(self, name, stage, parity):
        """The stage is empty here, and is to be in the other thread block, where there is one."""
        return iter(())

    def bring(self, pipe, stage, value):
        """Ask for what was announced."""
        pipe.content[stage] = "half written"

        def land():
            pipe.content[stage] = value
            pipe.full[stage].update(copies=-1)

        self.events.under_way.append(land)

    def gather(self, number, pipe, stage, value):
        """One loader's share of a block. Returns whether it is there."""
        of_block, by = self.gathered.setdefault((id(pipe), stage), (value, set()))
        if of_block != value:
            by = set()
            self.gathered[id(pipe), stage] = value, by
        if not by:
            pipe.content[stage] = "half written"

        def land():
            by.add(number)
            if len(by) == self.loaders:
                pipe.content[stage] = value

        self.events.under_way.append(land)
        return lambda: number in by

    def loader(self, number):
        k_ring, v_ring, tiles = Ring(self.key_stages), Ring(STAGES), Ring(TILE_SLOTS)
        gathered = []  # the blocks on their way: name, barrier, whether they are there

        def announce_oldest():
            name, full, is_there = gathered.pop(0)
            if self.there(f"loader: gathered {name} is there"):
                yield is_there
            self.arrive(f"loader: gathered {name} announced", full)

        def load(name, pipe, stage, parity, value):
            yield from self.wait(f"loader: {name} given back", pipe.empty[stage], parity ^ 1)
            yield from self.wait_for_other(name, stage, parity)
            expect(name != "q" or not self.unread("q"), "a letter is lost to the next Q")
            if self.gathers and name != "q":
                gathered.append((name, pipe.full[stage], self.gather(number, pipe, stage, value)))
                if len(gathered) > self.later:
                    yield from announce_oldest()
                return
            self.arrive(f"loader: {name} announced", pipe.full[stage],
                        copies=1 if name == "q" else self.copies_of_block)
            self.bring(pipe, stage, value)

        def load_block(name, pipe, ring, block):
            yield from load(name, pipe, ring.stage, ring.parity, (tiles.count, block))
            ring.count += 1

        def load_k(block):
            yield from load_block("k", self.k, k_ring, block)
            if number == 0:
                self.asked = tiles.count, block - piece.first

        yield from self.begin()
        while (piece := (yield from self.next_piece("loader", tiles))) is not None:
            if number == 0:
                self.asked = tiles.count, piece.end - piece.first
            n_block = piece.end - 1
            if n_block >= piece.first:
                yield from load_k(n_block)
            q_ring = Ring(self.query_stages, tiles.count)
            for q in self.q if number == 0 else ():
                yield from load("q", q, q_ring.stage, q_ring.parity, tiles.count)
            nearly_last = min(n_block, piece.first + LEAD)
            counted = self.counted and number == 0
            if n_block < piece.first and counted:
                self.arrive("loader: nothing to load", self.nearly_loaded)
            while n_block >= piece.first:
                if n_block == nearly_last and counted:
                    self.arrive("loader: nearly loaded", self.nearly_loaded)
                values_first = self.has_qv or self.values_early
                if values_first:
                    yield from load_block("v", self.loaded_v, v_ring, n_block)
                if n_block > piece.first:
                    yield from load_k(n_block - 1)
                if not values_first:
                    yield from load_block("v", self.loaded_v, v_ring, n_block)
                n_block -= 1
            while gathered:
                yield from announce_oldest()
            self.give_slot_back("loader", tiles, piece)

    def transposer(self, number):
        ring, tiles = Ring(STAGES), Ring(TILE_SLOTS)
        yield from self.begin()
        while (piece := (yield from self.next_piece("transposer", tiles))) is not None:
            count = tiles.count
            if number == 0:
                yield from self.find_descales("transposer", count)
            self.give_slot_back("transposer", tiles, piece)
            for block in range(piece.end - 1, piece.first - 1, -1):
                yield from self.wait("transposer: v is loaded", self.loaded_v.full[ring.stage], ring.parity)
                yield from self.wait("transposer: v given back", self.v.empty[ring.stage], ring.parity ^ 1)
                expect(self.loaded_v.content[ring.stage] == (count, block), "another block is turned")
                by = self.turned.setdefault(ring.stage, set())
                if (count, block, 1 - number) not in by:
                    by.clear()
                    self.v.content[ring.stage] = "half turned"
                yield lambda: True
                expect(self.loaded_v.content[ring.stage] == (count, block), "overwritten while it was turned")
                by.add((count, block, number))
                if len(by) == TRANSPOSERS:
                    self.v.content[ring.stage] = count, block
                self.arrive("transposer: v is turned", self.v.full[ring.stage])
                self.arrive("transposer: loaded v given back", self.loaded_v.empty[ring.stage])
                ring.count += 1

    def unread(self, box):
        """Whether a letter lies there."""
        return any(letter for (where, _), letter in self.letters.items() if where == box)

    def multiply(self, *operands):
        """A product: what it reads must be there from when it is issued until it is done. Returns whether it is."""
        ended = []

        def check():
            for pipe, stage, expected in operands:
                expect(pipe.content[stage] == expected, f"{pipe.content[stage]} where {expected} is read")

        def land():
            check()
            ended.append(True)

        check()
        self.events.under_way.append(land)
        return lambda: bool(ended)

    def product_done(self, site, product):
        if self.there(site):
            yield product
        expect(product(), "an accumulator is used before its product is done")

    def consumer(self, w, warp):
        k_ring, v_ring, tiles = Ring(self.key_stages), Ring(STAGES), Ring(TILE_SLOTS)
        q, mine, following = self.q[w % self.row_groups], self.turn[w], self.turn[(w + 1) % self.consumers]
        warp_barrier, staged = NamedBarrier(syncs_expected=LANES), [None] * LANES  # StagedRows: the warp's own
        scales = None  # the piece whose rows are finished

        def clear_idle_queries():
            for stage in range(self.query_stages):
                yield lambda: True
                self.idle_cleared.setdefault((stage, w), set()).add(warp)
            yield from self.sync("consumer: idle queries are cleared by all", self.own_barrier[w])

        def queries():
            idle = self.idle_cleared.get((q_ring.stage, w), set())
            expect(not self.idle_rows or len(idle) == WARPS, "idle rows hold anything")
            return q, q_ring.stage, tiles.count

        def keys(block):
            return self.k, k_ring.stage, (tiles.count, block)

        def values(block):
            if piece.cut and block == piece.end - 1 and not self.eight_bits:
                by = self.cleared.get((v_ring.stage, w), set())
                expect(by == {(tiles.count, i) for i in range(WARPS)}, "values past the end are read")
            return self.v, v_ring.stage, (tiles.count, block)

        def operands(block):
            """What scores are made of; where they have two parts, what is left of them."""
            part = (self.loaded_v, k_ring.stage, (tiles.count, block)),
            return queries(), *(() if self.two_parts else (keys(block),)), *(part if self.has_qv else ())

        def tell(box, block, number):
            """Write a letter, into staging or into the place of Q; of 8 bits it has one of its own."""
            if box == "q" and not self.eight_bits:
                expect(len(self.in_registers[tiles.count]) == 2 * WARPS, "Q is overwritten before it was read")
                expect(q.content[q_ring.stage] == tiles.count, "a letter where the next Q arrives")
            elif box == "staging":
                expect(self.staging == 0, "a letter where output is staged")
            expect(not self.letters.get((box, warp)), "a letter is overwritten before it was read")
            self.letters[box, warp] = tiles.count, block, number, w

        def read(box, block, number):
            expect(self.letters.get((box, warp)) == (tiles.count, block, number, 1 - w), "another letter than expected")
            self.letters[box, warp] = None

        def add_others(block):
            """Exchange::add_others."""
            first, second = ("q", "staging") if w == 0 else ("staging", "q")
            tell(first, block, 1)
            yield from self.sync("consumer: first letters are written", self.pair[warp])
            yield lambda: True
            read(second, block, 1)
            tell(second, block, 2)
            yield from self.sync("consumer: second letters are written", self.pair[warp])
            yield lambda: True
            read(first, block, 2)

        def open_exchange():
            yield lambda: True
            self.in_registers.setdefault(tiles.count, set()).add((w, warp))
            yield from self.sync("consumer: all have their queries", self.both)

        def close_exchange():
            yield from self.sync("consumer: all letters are read", self.both)

        def clear_values_past_end():
            yield from wait_for("consumer: v to clear is there", self.v, v_ring)
            expect(self.v.content[v_ring.stage] == (tiles.count, piece.end - 1), "cleared before it was there")
            by = self.cleared.setdefault((v_ring.stage, w), set())
            by -= {old for old in by if old[0] != tiles.count}
            by.add((tiles.count, warp))
            yield from self.sync("consumer: v is cleared by all", self.own_barrier[w])

        def release(site, pipe, ring):
            self.arrive(site, pipe.empty[ring.stage])
            ring.count += 1

        def take(site):
            if self.takes_turns:
                yield from self.sync(site, mine)

        def hand_on(site):
            if self.takes_turns and self.there(site):
                following.join(arrivals=1)

        def wait_for(site, pipe, ring):
            yield from self.wait(site, pipe.full[ring.stage], ring.parity)

        def wait_for_value_part(site):
            if self.has_qv:
                yield from wait_for(site, self.loaded_v, k_ring)

        def release_k(site):
            if self.two_parts:
                self.arrive(f"{site}, with v", self.loaded_v.empty[k_ring.stage])
            release(site, self.k, k_ring)

        def multiply_key_part(block, *others):
            """Of two parts the first, beside the values of the block before."""
            product = self.multiply(queries(), keys(block), *others)
            yield from self.product_done("consumer: first part is done", product)

        def skip_blocks(count, last_has_no_turn):
            for i in range(count):
                yield from wait_for("consumer: skipped k is there", self.k, k_ring)
                release_k("consumer: skipped k given back")
                yield from wait_for("consumer: skipped v is there", self.v, v_ring)
                release("consumer: skipped v given back", self.v, v_ring)
                if last_has_no_turn and i == count - 1:
                    break
                yield from take("consumer: skipped turn taken")
                hand_on("consumer: skipped turn passed")

        def attend(first, end, meanwhile):
            if self.eight_bits:
                yield from self.wait("consumer: slot scaled", self.scaled[tiles.stage], tiles.parity)
                expect(self.scales[tiles.stage] == tiles.count, "descales of another piece")
            yield from skip_blocks(piece.end - end, first == end)
            yield from self.wait("consumer: q is there", q.full[q_ring.stage], q_ring.parity)
            if first != end:
                if self.has_qv:
                    yield from open_exchange()
                yield from wait_for("consumer: first k is there", self.k, k_ring)
                if self.two_parts:
                    yield from multiply_key_part(end - 1)
                yield from wait_for_value_part("consumer: first part is there")
                product = self.multiply(*operands(end - 1))
                yield from self.product_done("consumer: first product is done", product)
                release_k("consumer: first k given back")
                if self.has_qv:
                    yield from add_others(end - 1)
                if piece.cut and end == piece.end and not self.eight_bits:
                    yield from clear_values_past_end()
                for block in range(end - 2, first - 1, -1):
                    if self.keys_first:
                        yield from wait_for("consumer: k is there first", self.k, k_ring)
                        product = self.multiply(*operands(block))
                        yield from self.product_done("consumer: scores are done", product)
                        release_k("consumer: k given back first")
                        yield from wait_for("consumer: v of the block before is there", self.v, v_ring)
                        product = self.multiply(values(block + 1))
                        yield from self.product_done("consumer: product with values is done", product)
                        release("consumer: v given back", self.v, v_ring)
                        continue
                    if self.two_parts:
                        yield from wait_for("consumer: turned v is there", self.v, v_ring)
                        yield from wait_for("consumer: k of two parts is there", self.k, k_ring)
                        yield from multiply_key_part(block, values(block + 1))
                        release("consumer: turned v given back", self.v, v_ring)
                    elif self.has_qv:
                        product = self.multiply(values(block + 1))
                        yield from self.product_done("consumer: product with values is done", product)
                        release("consumer: v given back", self.v, v_ring)
                        yield from wait_for("consumer: k is there", self.k, k_ring)
                    else:
                        yield from wait_for("consumer: k is there", self.k, k_ring)
                        yield from wait_for("consumer: v is there", self.v, v_ring)
                    yield from wait_for_value_part("consumer: part is there")
                    yield from take("consumer: turn taken")
                    early = self.multiply(values(block + 1)) if self.values_early else None
                    together = () if self.has_qv or self.values_early else (values(block + 1),)
                    product = self.multiply(*operands(block), *together)
                    hand_on("consumer: turn passed")
                    if self.values_early:
                        yield from self.product_done("consumer: product with values is done", early)
                        release("consumer: v given back", self.v, v_ring)
                    yield from self.product_done("consumer: products are done", product)
                    release_k("consumer: k given back")
                    if self.has_qv:
                        yield from add_others(block)
                    elif not self.values_early:
                        release("consumer: v given back", self.v, v_ring)
                if self.has_qv:
                    yield from close_exchange()
                self.arrive("consumer: q given back", q.empty[q_ring.stage])
                yield from wait_for("consumer: last v is there", self.v, v_ring)
                product = self.multiply(values(first))
                yield lambda: True
                meanwhile()
                yield from self.product_done("consumer: last product is done", product)
                release("consumer: last v given back", self.v, v_ring)
            else:
                meanwhile()
                self.arrive("consumer: unused q given back", q.empty[q_ring.stage])
            yield from skip_blocks(first - piece.first, False)

        def finish_rows():
            nonlocal scales
            self.read_slot(tiles, piece)
            scales = tiles.count

        def write_rows(lane):
            """RowWriter: each lane stages its part of 64 columns, then reads what others have staged."""
            self.read_slot(tiles, piece)
            expect(scales == tiles.count, "rows are written before they are finished")
            for group in range(GROUPS):
                staged[lane] = tiles.count, group
                yield from self.sync("lane: columns are staged", warp_barrier)
                for _ in range(LANES):
                    expect(staged == [(tiles.count, group)] * LANES, f"{staged} where columns {group} are read")
                    yield lambda: True
                yield from self.sync("lane: columns are written", warp_barrier)

        def write_with_all_lanes():
            """Lanes go each their way until the whole warp gives the piece back."""
            lanes = {f"lane {lane} of warp {warp} of warpgroup {w}": write_rows(lane) for lane in range(LANES)}
            expect(not self.unread("staging"), "output is staged where a letter lies")
            self.staging += 1
            names = self.start(lanes)
            yield lambda: names.isdisjoint(self.events.actors)
            self.staging -= 1

        def leave_part():
            """PartRows::leave: a warp counts for its warpgroup, once all have left their rows; and tells them."""
            yield lambda: True
            self.left.setdefault((w, tiles.count), set()).add(warp)
            yield from self.sync("consumer: rows are left by all", self.own_barrier[w])
            if warp == 0:
                expect(len(self.left[w, tiles.count]) == WARPS, "counted before all rows were there")
                yield lambda: True
                self.counted_parts[w] = tiles.count
            yield from self.sync("consumer: whether all parts are there", self.own_barrier[w])
            expect(self.counted_parts.get(w) == tiles.count, "joined before the parts were counted")
            return w in piece.joiners

        yield from self.begin(makes_barriers=w == warp == 0)
        if w == self.consumers - 1:
            hand_on("consumer: first turn passed")
        if self.idle_rows:
            yield from clear_idle_queries()
        while (piece := (yield from self.next_piece("consumer", tiles))) is not None:
            q_ring = Ring(self.query_stages, tiles.count)
            whole = piece.joiners is None
            yield from attend(*piece.own[w % self.row_groups], finish_rows if whole else lambda: None)
            if whole:
                yield from write_with_all_lanes()
            elif self.has_qv or (yield from leave_part()):  # with qv it is leave_rows, where nobody waits
                self.read_slot(tiles, piece)
                yield lambda: True
            self.give_slot_back("consumer", tiles, piece)
        if w == 0 and self.takes_turns:
            yield from self.sync("consumer: last turn taken", mine)
        yield from self.meet("consumer: nothing more arrives from the other")

    def start(self, actors):
        """Returns the names they go by."""
        started = {f"{self.name}{name}": (actor, lambda: True) for name, actor in actors.items()}
        self.events.actors |= started
        return started.keys()

    def until_end(self, warp):
        yield from warp
        self.end_warp()

    def end_warp(self):
        """With its last warp a thread block's shared memory goes."""
        self.warps -= 1
        if self.warps == 0:
            expect(all(turn.syncs == turn.arrivals == 0 for turn in self.turn), "turns are left over at the end")
            for barrier in self.barriers():
                barrier.pending = None

    def launch(self):
        warps = {"scheduler": self.scheduler()}
        warps |= {f"loader {number}": self.loader(number) for number in range(self.loaders)}
        warps |= {f"warp {i} of warpgroup {w}": self.consumer(w, i)
                  for w in range(self.consumers) for i in range(WARPS)}
        warps |= {f"transposer {number}": self.transposer(number) for number in range(self.transposers)}
        self.start({name: self.until_end(warp) for name, warp in warps.items()})

    def run(self, choose):
        self.launch()
        self.events.run(choose)
