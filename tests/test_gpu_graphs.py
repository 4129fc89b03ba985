"""Calls on a paged cache, captured once with the largest lengths, and replayed with any others on several streams."""

import numpy as np
import pytest
from server_arrays import TorchArrays
from server_models import Model
from server_reference import rotate, shares

import fa3

pytestmark = pytest.mark.gpu
SLOTS, MAX_PAGES, ROUNDS = 5, 12, 8
DRAFTED, RAGGED_ROWS = 4, 40


class Step:
    """A call of `each` queries a sequence, or of a ragged 0 to 40 in all (`each` None), in memory of its own."""

    def __init__(self, arrays, model, each, seed):
        self.arrays, self.model, self.each = arrays, model, each
        self.random = np.random.default_rng(seed)
        self.capacity = MAX_PAGES * model.page_size
        self.rows = RAGGED_ROWS if each is None else SLOTS * each
        heads = (model.heads, model.head_dim), (model.heads_kv, model.head_dim), (model.heads_kv, model.head_dim_v)
        self.new = [arrays.poison((self.rows, *sizes), model.dtype) for sizes in heads]
        self.pools = [arrays.poison((model.num_pages, model.page_size, *sizes), model.dtype) for sizes in heads[1:]]
        largest = self.capacity - (self.rows if each is None else each)
        self.table = arrays.put(self.draw_table())
        self.lengths = arrays.put(np.full(SLOTS, largest, np.int32))
        self.starts = arrays.put(np.linspace(0, self.rows, SLOTS + 1).astype(np.int32))
        self.metadata = fa3.get_scheduler_metadata(SLOTS, self.rows // SLOTS, self.capacity, model.heads,
                                                   model.heads_kv, model.head_dim, self.lengths)
        self.given = {}
        if model.rotary_dim:
            angles = self.random.uniform(0, 6, (self.capacity, model.rotary_dim // 2)).astype(np.float32)
            self.given = {"rotary_cos": arrays.put(np.cos(angles)), "rotary_sin": arrays.put(np.sin(angles)),
                          "rotary_interleaved": model.interleaved}
        if model.is_fp8:
            self.given = {name: arrays.put(values) for name, values in model.descales.items()}
        self.replay = arrays.capture(self.call)
        self.found = []

    def draw_table(self):
        pages = self.random.permutation(self.model.num_pages)[:SLOTS * MAX_PAGES]
        return pages.reshape(SLOTS, MAX_PAGES).astype(np.int32)

    def call(self):
        q, k, v = (self.arrays.typed(bits, self.model.dtype) for bits in self.new)
        given = {}
        if self.each is None:
            given = {"cu_seqlens_q": self.starts, "cu_seqlens_k_new": self.starts}
        else:
            q, k, v = (x.reshape(SLOTS, self.each, *x.shape[1:]) for x in (q, k, v))
        self.out, self.lse = fa3.flash_attn_with_kvcache(
            q, *(self.arrays.typed(bits, self.model.dtype) for bits in self.pools), page_table=self.table,
            k=k, v=v, cache_seqlens=self.lengths, scheduler_metadata=self.metadata, return_lse=True, **given,
            **self.given, **self.model.options)

    def next_round(self):
        """Other lengths, pages, rows and queries; a replay; what is wrong with it, as scalars on the device."""
        arrays, model, size = self.arrays, self.model, self.model.page_size
        table = self.draw_table()
        counts = [self.each] * SLOTS
        if self.each is None:
            ends = np.sort(self.random.integers(0, self.rows + 1, SLOTS))
            counts = np.diff(ends, prepend=0).tolist()
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        edges = [0, 1, size - 1, size, size + 1, self.capacity]
        lengths = [min(self.random.choice([*edges, self.random.integers(self.capacity)]), self.capacity - count)
                   for count in counts]
        places = [table[b, np.arange(length + count) // size] * size + np.arange(length + count) % size
                  for b, (length, count) in enumerate(zip(lengths, counts, strict=True))]
        cached = arrays.put(np.concatenate([at[:length] for at, length in zip(places, lengths, strict=True)]))
        appended = arrays.put(np.concatenate([at[length:] for at, length in zip(places, lengths, strict=True)]))
        positions = arrays.put(np.concatenate([
            np.arange(length, length + count) for length, count in zip(lengths, counts, strict=True)]))

        nan = arrays.poison((1,), model.dtype)[0]
        for bits in (*self.new, *self.pools):
            bits[...] = nan
        for bits in self.new:
            bits[:starts[-1]] = arrays.bits(arrays.normal((int(starts[-1]), *bits.shape[1:]), model.dtype))
        for bits in self.pools:
            rows = bits.reshape(-1, *bits.shape[2:])
            rows[cached] = arrays.bits(arrays.normal((len(cached), *rows.shape[1:]), model.dtype))
        for array, values in ((self.table, table), (self.starts, starts), (self.lengths, np.array(lengths, np.int32))):
            array.copy_(arrays.put(values))
        q, k, v = (arrays.typed(bits[:starts[-1]], model.dtype) for bits in self.new)
        if model.rotary_dim:
            cos, sin = (self.given[name][positions] for name in ("rotary_cos", "rotary_sin"))
            q, k = (rotate(arrays, x, cos, sin, model.interleaved, model.dtype) for x in (q, k))
        expected = [bits.clone() for bits in self.pools]
        for bits, new in zip(expected, (k, v), strict=True):
            bits.reshape(-1, *bits.shape[2:])[appended] = arrays.bits(new)
        self.replay()
        for bits, right in zip(self.pools, expected, strict=True):
            self.found.append((f"pool of {model.name}, lengths {lengths} and {counts}", arrays.total(bits != right)))
        out = self.out.reshape(self.rows, *self.out.shape[-2:])
        for b, (start, count) in enumerate(zip(starts[:-1], counts, strict=True)):
            if count:
                rows = slice(start, start + count)
                keys, values = (arrays.typed(bits.reshape(-1, *bits.shape[2:])[arrays.put(places[b])], model.dtype)
                                for bits in expected)
                lse = self.lse[b] if self.each else self.lse[:, rows]
                for share in shares(arrays, model, q[rows], keys, values, out[rows], lse):
                    self.found.append((f"{model.name}, sequence {b}, {count} queries after {lengths[b]} keys", share))


STEPS = [
    (Model("decode", heads=32, heads_kv=8, head_dim=128, head_dim_v=128, num_pages=80, rotary_dim=128), 1),
    (Model("draft", "float16", page_size=3, num_pages=64, rotary_dim=32, interleaved=False), DRAFTED),
    (Model("d80", "float16", heads=16, head_dim=80, head_dim_v=80, page_size=64, num_pages=61), 1),
    (Model("fp8", "float8_e4m3fn", head_dim=128, head_dim_v=128, page_size=32, num_pages=70), 1),
    (Model("mix", heads=6, head_dim=96, head_dim_v=96, page_size=16, num_pages=60, window=50), None),
    (Model("mix in rows", heads=4, heads_kv=1, page_size=8, num_pages=60, rotary_dim=64), None),
]


def test_replays_with_other_lengths_and_pages_on_several_streams(torch):
    """Nothing waits for anything but its own stream: graphs run beside each other, and the host ahead of all."""
    arrays = TorchArrays(0)
    steps = [Step(arrays, model, each, seed) for seed, (model, each) in enumerate(STEPS)]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                step.next_round()
    torch.cuda.synchronize()
    found = [pair for step in steps for pair in step.found]
    for (what, _), value in zip(found, arrays.host([scalar for _, scalar in found]), strict=True):
        assert value <= (1 if isinstance(value, float) else 0), f"{what}: {value}"
