"""A server's day: a paged cache driven as a serving engine does, each step checked.

Sequences arrive (some with a live one's prefix, whose pages they share, some as its fork), have their prompts
prefilled in chunks, decode, have tokens drafted and in part rejected, and end. Three calls a step, on three streams of
a GPU, some of them graphs: one query a sequence; two to eight; and a ragged mix of chunks and single queries. What no
sequence has is NaN. After each step the whole pool is compared with what it should hold, bit for bit, and a sample of
results with float64.

    python tests/server_day.py --steps 4000 [--device gpu] [--seed 0] [--log FILE]

prints a log and exits with 0 if all was right. The same seed gives the same log, digests of all results included. The
log of a long run on a GPU is in bench/results.
"""

import argparse
import datetime
import hashlib
import sys
import time

import numpy as np
from server_arrays import NumpyArrays, TorchArrays
from server_graphs import capture_graphs
from server_models import choose
from server_pool import Pool
from server_reference import rotate, shares
from server_schedule import Schedule, Tally

import fa3

# What a page table says behind a sequence's end does not matter.
BEHIND_THE_END = (-1, 0, 3, 10**6, 2**31 - 1)
STEPS_BETWEEN_READINGS = 25


class WrongResultError(AssertionError):
    """A result, or the pool, is not as it should be."""


class Day:
    """One model's sequences, pool and calls."""

    def __init__(self, arrays, model, load, seed):
        self.arrays, self.model, self.load = arrays, model, load
        self.random = np.random.default_rng(seed)
        self.pool, self.tally = Pool(arrays, model, self.random), Tally()
        self.schedule = Schedule(self.pool, load, self.random, self.tally)
        self.digest = hashlib.blake2b(digest_size=8)
        self._readings = []  # (how to take it, what it is of, a scalar on the device)
        longest = load.prompt + load.output + 8
        self.max_pages = -(-longest // model.page_size)
        self.constants = self._constants(self.max_pages * model.page_size)
        self.constants_of_reads = {name: array for name, array in self.constants.items()
                                   if not name.startswith("rotary")}
        self._graphs = capture_graphs(self) if arrays.has_graphs else []

    def _constants(self, positions):
        """The arrays that are the same in every call."""
        model, put = self.model, self.arrays.put
        given = {}
        if model.rotary_dim:
            angles = np.arange(positions)[:, None] * 0.7 ** np.arange(model.rotary_dim // 2)
            given = {"rotary_cos": put(np.cos(angles).astype(np.float32)),
                     "rotary_sin": put(np.sin(angles).astype(np.float32)),
                     "rotary_interleaved": model.interleaved}
        if model.has_sinks:
            given["sinks"] = put(model.sinks)
        if model.is_fp8:
            given |= {name: put(values) for name, values in model.descales.items()}
        return given

    # ---- a step ---------------------------------------------------------------------------------------------

    def step(self):
        """Sequences come, three calls are made, sequences end."""
        self.tally.steps += 1
        batches = self.schedule.batches()
        self.arrays.fork()
        for index, batch in enumerate(batches):
            if batch.sequences:
                with self.arrays.stream((index + self.tally.steps) % self.arrays.num_streams):
                    self._serve(batch)
        self.arrays.join()
        self._note("strays", "pool", self.pool.strays())
        for batch in batches:
            self.schedule.advance(batch)
        self.pool.poison()
        if self.tally.steps % STEPS_BETWEEN_READINGS == 0:
            self.read()

    # ---- a call ---------------------------------------------------------------------------------------------

    def _serve(self, batch):
        """Make new rows, call, and have a sample checked; all of it on the current stream."""
        arrays, model, pool = self.arrays, self.model, self.pool
        self.tally.calls += 1
        places = [(s.pages, np.arange(s.length, s.length + count))
                  for s, count in zip(batch.sequences, batch.counts, strict=True)]
        rows = np.concatenate([pool.row(*place) for place in places])
        q = arrays.normal((batch.total, model.heads, model.head_dim), model.dtype)
        k, v = (arrays.normal((batch.total, model.heads_kv, dim), model.dtype)
                for dim in (model.head_dim, model.head_dim_v))
        turned_q, turned_k = q, k
        if model.rotary_dim:
            at = arrays.put(np.concatenate([positions for _, positions in places]))
            cos, sin = (self.constants[name][at] for name in ("rotary_cos", "rotary_sin"))
            turned_q, turned_k = (rotate(arrays, x, cos, sin, model.interleaved, model.dtype) for x in (q, k))
        pool.expect(arrays.put(rows), turned_k, v, batch.written_first)
        graph = next((graph for graph in self._graphs if graph.takes(batch)), None)
        asked = turned_q if batch.written_first else q
        if graph is not None and self.random.random() < 0.7:
            self.tally.graph_calls += 1
            how, (out, lse) = "graph", graph.replay(batch, asked, k, v, self.table(batch))
        elif batch.written_first:
            how, out, lse = self._read(batch, asked)
        else:
            how, out, lse = self._append(batch, asked, k, v)
        self._note("strays", f"NaN in out, {batch.kind} ({how})",
                   arrays.total(arrays.xp.isnan(arrays.cast(out, "float32"))))
        bits = arrays.longs(arrays.bits(out)).reshape(-1)
        self._note("digest", "", arrays.total(bits * (2 * arrays.arange(len(bits)) + 1)))
        for place in self._sample(len(batch.sequences)):
            self._check(batch, place, how, turned_q, out, lse)

    def table(self, batch, width=None):
        """The batch's page table; behind a sequence's end it says anything."""
        table = self.random.choice(BEHIND_THE_END, (len(batch.sequences), width or self.max_pages))
        for line, sequence in zip(table, batch.sequences, strict=True):
            line[:len(sequence.pages)] = sequence.pages
        return table.astype(np.int32)

    def _narrow_table(self, batch):
        """The same, not much wider than it must be."""
        longest = max(len(sequence.pages) for sequence in batch.sequences)
        return self.arrays.put(self.table(batch, longest + int(self.random.integers(0, 3))))

    def _ways(self):
        """How to go about a call; what comes out must not depend on it."""
        return {"num_splits": int(self.random.choice([0, 0, 1, 3])),
                "batch_invariant": bool(self.random.random() < 0.1),
                "pack_gqa": [None, None, True, False][self.random.integers(4)]}

    def _append(self, batch, q, k, v):
        """New rows and their attention in one call."""
        put, model = self.arrays.put, self.model
        ways = self._ways()
        given = {"cache_seqlens": put(batch.lengths), "page_table": self._narrow_table(batch)}
        if self.random.random() < 0.3:
            given["scheduler_metadata"] = fa3.get_scheduler_metadata(
                len(batch.counts), max(batch.counts), self.max_pages * model.page_size, model.heads, model.heads_kv,
                model.head_dim, given["cache_seqlens"], page_size=model.page_size)
        if batch.kind == "mix":
            given |= {"cu_seqlens_q": put(batch.starts), "cu_seqlens_k_new": put(batch.starts)}
            if self.random.random() < 0.5:
                given["max_seqlen_q"] = max(batch.counts)
            out, lse = self._guarded(fa3.flash_attn_with_kvcache, batch, q, k=k, v=v, **given, **ways,
                                     **self.constants)
        else:
            q, k, v = (x.reshape(len(batch.counts), -1, *x.shape[1:]) for x in (q, k, v))
            out, lse = fa3.flash_attn_with_kvcache(q, self.pool.k, self.pool.v, k=k, v=v, return_lse=True, **given,
                                                   **ways, **self.constants, **model.options)
        return f"append, {ways}", out.reshape(batch.total, *out.shape[-2:]), lse

    def _read(self, batch, q):
        """The attention alone: rows have been written, and queries turned."""
        put, ways = self.arrays.put, self._ways()
        lengths, table = put(batch.lengths_after), self._narrow_table(batch)
        if batch.kind == "mix":
            out, lse = self._guarded(fa3.flash_attn_varlen_func, batch, q, cu_seqlens_q=put(batch.starts),
                                     cu_seqlens_k=None, seqused_k=lengths, page_table=table, **ways,
                                     **self.constants_of_reads)
        else:
            q = q.reshape(len(batch.counts), -1, *q.shape[1:])
            out, lse = fa3.flash_attn_with_kvcache(q, self.pool.k, self.pool.v, cache_seqlens=lengths,
                                                   page_table=table, return_lse=True, **ways,
                                                   **self.constants_of_reads, **self.model.options)
        return f"read, {ways}", out.reshape(batch.total, *out.shape[-2:]), lse

    def _guarded(self, function, batch, q, **given):
        """A ragged call whose q and out have rows behind the last sequence's, which must stay as they are."""
        arrays, model, behind = self.arrays, self.model, 3
        bits = arrays.poison((batch.total + behind, model.heads, model.head_dim), model.dtype)
        bits[:batch.total] = arrays.bits(q)
        out = arrays.poison((batch.total + behind, model.heads, model.head_dim_v), model.out_dtype)
        _, lse = function(arrays.typed(bits, model.dtype), self.pool.k, self.pool.v, return_lse=True,
                          out=arrays.typed(out, model.out_dtype), **given, **model.options)
        untouched = arrays.poison((behind, model.heads, model.head_dim_v), model.out_dtype)
        self._note("strays", f"rows of out behind the last sequence, {batch.kind}",
                   arrays.total(out[batch.total:] != untouched))
        return arrays.typed(out[:batch.total], model.out_dtype), lse

    # ---- checks ---------------------------------------------------------------------------------------------

    def _sample(self, count):
        """Up to two of a batch's sequences."""
        return sorted(set(self.random.integers(0, count, 2).tolist()))

    def _check(self, batch, place, how, q, out, lse):
        sequence, start, count = batch.sequences[place], int(batch.starts[place]), batch.counts[place]
        length = sequence.length + count
        rows = slice(start, start + count)
        k, v = self.pool.read(self.arrays.put(self.pool.row(sequence.pages, np.arange(length))))
        own_lse = lse[:, rows] if lse.ndim == 2 else lse[place]
        share, lse_share = shares(self.arrays, self.model, q[rows], k, v, out[rows], own_lse)
        what = (f"{batch.kind} ({how}), sequence {sequence.number}, at {place} of {len(batch.sequences)}: "
                f"{count} queries on {length} keys")
        self.tally.checked += count * self.model.heads
        self._note("share", what, share)
        self._note("lse", f"lse of {what}", lse_share)

    def _note(self, how, what, scalar):
        """Keep a scalar of the device for the next reading: nothing waits for the GPU in between."""
        self._readings.append((how, f"{self.model.name}, step {self.tally.steps}: {what}", scalar))

    def read(self):
        """Look at what was noted since the last reading, and raise WrongResultError at the first that is wrong."""
        values = self.arrays.host([scalar for _, _, scalar in self._readings])
        for (how, what, _), value in zip(self._readings, values, strict=True):
            if how == "digest":
                self.digest.update(value.to_bytes(8, "little", signed=True))
            elif how == "strays" and value:
                raise WrongResultError(f"{what}: {value} elements are not as they should be")
            elif how in ("share", "lse"):
                if not value <= 1:
                    raise WrongResultError(f"{what}: the error is {value:.3g} of what is allowed")
                if how == "share":
                    self.tally.worst = max(self.tally.worst, value)
                else:
                    self.tally.worst_lse = max(self.tally.worst_lse, value)
        self._readings = []


COLUMNS = ("steps", "served", "evicted", "live", "tokens", "calls", "graphs", "pages in use", "rows checked",
           "worst error", "worst lse")


def row(day):
    """A line of the log, in COLUMNS' order. Errors are shares of what is allowed."""
    t = day.tally
    cells = (t.steps, t.served, t.evicted, len(day.schedule.live), t.tokens, t.calls, t.graph_calls,
             f"{day.pool.pages_used:,} of {day.model.num_pages:,}", t.checked, f"{t.worst:.2f}", f"{t.worst_lse:.2g}")
    return "  ".join((f"{cell:,}" if isinstance(cell, int) else cell).rjust(max(len(name), 9))
                     for cell, name in zip(cells, COLUMNS, strict=True))


def spend(day, steps, lines=0, say=print):
    """Make a day's steps, with so many lines of log on the way."""
    if lines:
        say(f"{day.model.name}: {day.model.describe()}")
        say("  ".join(name.rjust(max(len(name), 9)) for name in COLUMNS))
    for done in range(1, steps + 1):
        day.step()
        if lines and (done % max(1, steps // lines) == 0 or done == steps):
            day.read()
            say(row(day))
    day.read()
    return day


def main(argv=None):
    """Run the command: 0, or 1 when something was wrong."""
    parser = argparse.ArgumentParser(description="A server's day on a paged cache, each step checked.")
    parser.add_argument("--steps", type=int, default=1000, help="of all models together")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=argparse.FileType("w"), help="where to write the log as well")
    parser.add_argument("--commit", default="unknown", metavar="ID", help="what the log belongs to")
    args = parser.parse_args(argv)

    def say(line):
        for file in filter(None, (sys.stdout, args.log)):
            print(line, file=file, flush=True)

    models, load = choose(args.device == "gpu")
    began, days = time.monotonic(), []
    for number, model in enumerate(models):
        seed = args.seed * 1000 + number
        arrays = TorchArrays(seed) if args.device == "gpu" else NumpyArrays(seed)
        if not days:
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            say(f"A server's day: {args.steps:,} steps, seed {args.seed}, {arrays.name}, fa3 {fa3.__version__}, "
                f"{date}, commit {args.commit}\n")
        day = Day(arrays, model, load, seed)
        try:
            days.append(spend(day, -(-args.steps // len(models)), 4, say))
        except WrongResultError as error:
            say(f"WRONG: {error}")
            return 1
        say(f"digest {day.digest.hexdigest()}\n")
    tallies = [day.tally for day in days]
    total = {name: sum(getattr(t, name) for t in tallies) for name in (
        "steps", "served", "evicted", "tokens", "calls", "graph_calls", "checked")}
    say(f"ok: {total['steps']:,} steps, {total['served']:,} sequences served, {total['evicted']:,} evicted, "
        f"{total['tokens']:,} tokens, {total['calls']:,} calls ({total['graph_calls']:,} as graphs), "
        f"{total['checked']:,} rows checked, worst error {max(t.worst for t in tallies):.2f} of what is allowed "
        f"(lse {max(t.worst_lse for t in tallies):.2g}), no element of a pool astray")
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
