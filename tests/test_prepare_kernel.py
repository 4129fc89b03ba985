"""The kernel before attention on a cache, without a GPU: its source on an emulated one, against the CPU's backend.

What it appends and turns is the CPU's bit for bit; nothing else is written, whatever lengths, entries and pages say.
"""

import ctypes
from dataclasses import dataclass

import forward_params
import ml_dtypes
import numpy as np
import pytest
from compilers import HERE, SRC, host_library
from forward_params import address
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_quantize_kernel import embedded

from fa3._numpy_cache import Rotary, append, find_sequences

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
          "float32": np.float32}
INT_MAX, INT_MIN = 2**31 - 1, -2**31


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp("host"), "prepare",
                           [HERE / "host" / "prepare.cpp", SRC / "prepare_plan.cpp"], f"-I{HERE / 'host' / 'gpu'}",
                           "-ffp-contract=off", "-fno-extern-tls-init", "-Wno-unknown-pragmas", sanitize=False)
    library.params_size.restype = ctypes.c_size_t
    library.prepare_emulated.restype = ctypes.c_int64
    library.prepare_emulated.argtypes = [ctypes.c_void_p] * 3
    assert library.params_size() == ctypes.sizeof(forward_params.Params)
    return library


@dataclass(frozen=True)
class Case:
    cached: tuple[int, ...]
    new: tuple[int, ...] | None = None
    seqlens_q: tuple[int, ...] = (1,)
    layout: str = "dense"  # or "indexed", "paged"
    page_size: int = 4
    room: int = 0
    num_heads_kv: int = 1
    ratio: int = 1
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "bfloat16"
    one_length: bool = False  # said by a number, not an array
    varlen_q: bool = False
    varlen_new: bool = False
    uses_q: bool = False  # not all rows of q are in use
    rotary_dim: int = 0
    rotary_dtype: str = "float32"
    interleaved: bool = True
    rotary_seqlens: tuple[int, ...] | None = None
    causal: bool = False
    offset: int = 0  # elements between an aligned address and every array's
    padding: int = 0  # elements between rows

    @property
    def batch(self):
        return len(self.cached)

    @property
    def new_rows(self):
        return self.new or (0,) * self.batch


@st.composite
def cases(draw, longest=12, page_sizes=(1, 3, 4, 16)):
    batch = draw(st.integers(1, 4))
    one_length, varlen_q, varlen_new = (draw(st.booleans()) for _ in range(3))

    def lengths(strategy, free):
        return tuple(draw(strategy) for _ in range(batch)) if free else (draw(strategy),) * batch

    new = lengths(st.integers(0, 9), varlen_new) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float8_e4m3fn"]))
    fp8 = dtype == "float8_e4m3fn"
    head_dim = draw(st.sampled_from([64, 16, 128, 256] if fp8 else [64, 16, 40, 72, 128, 256]))
    rotary_dim = draw(st.sampled_from([0, 16, 32, head_dim // 16 * 16])) if not fp8 else 0
    return Case(
        cached=lengths(st.integers(0, longest), not (new and one_length)), new=new,
        one_length=one_length and new is not None, seqlens_q=lengths(st.integers(0, 6), varlen_q),
        layout=draw(st.sampled_from(["dense", "indexed", "paged"])), page_size=draw(st.sampled_from(page_sizes)),
        room=draw(st.sampled_from([0, 5])), num_heads_kv=draw(st.integers(1, 3)),
        ratio=draw(st.sampled_from([1, 3])), head_dim=head_dim,
        head_dim_v=draw(st.sampled_from([head_dim, 16, 48] if fp8 else [head_dim, 8, 24])), dtype=dtype,
        varlen_q=varlen_q, varlen_new=varlen_new,
        uses_q=draw(st.booleans()), rotary_dim=min(rotary_dim, head_dim),
        rotary_dtype=draw(st.sampled_from(["float32", dtype])), interleaved=draw(st.booleans()),
        rotary_seqlens=draw(st.none() | st.just(lengths(st.integers(0, 20), True))) if rotary_dim else None,
        causal=draw(st.booleans()), offset=draw(st.sampled_from([0, 0, 8, 1, 4])),
        padding=draw(st.sampled_from([0, 0, 8, 3])))


class Call:
    """A case's arrays, each inside a buffer of NaN, and the struct that speaks of them."""

    def __init__(self, case, seed):
        self.case, c = case, case
        self.random = np.random.default_rng(seed)
        self.dtype = DTYPES[c.dtype]
        self.kept, self.integers = [], {}
        heads, batch = c.num_heads_kv * c.ratio, c.batch
        self.capacity = max(length + new for length, new in zip(c.cached, c.new_rows, strict=True)) + c.room
        if c.layout == "paged":
            self.max_pages = max(-(-self.capacity // c.page_size), 1)
            self.capacity = self.max_pages * c.page_size
            places = (batch * self.max_pages + 2, c.page_size)
            self.set("page_table", self.random.permutation(places[0])[:batch * self.max_pages].reshape(batch, -1))
        else:
            places = (batch + (2 if c.layout == "indexed" else 0), self.capacity)
            if c.layout == "indexed":
                self.set("cache_batch_idx", self.random.permutation(places[0])[:batch])
        self.k = self.array(*places, c.num_heads_kv, c.head_dim)
        self.v = self.array(*places, c.num_heads_kv, c.head_dim_v)
        rows_q = (sum(c.seqlens_q) + 2,) if c.varlen_q else (batch, c.seqlens_q[0])
        self.q = self.array(*rows_q, heads, c.head_dim)
        if c.varlen_q:
            self.set("cu_seqlens_q", cumulated(c.seqlens_q))
        if c.uses_q:
            self.set("seqused_q", [self.random.integers(0, length + 1) for length in c.seqlens_q])
        if not c.one_length:
            self.set("seqused_k", c.cached)
        self.k_new = self.v_new = None
        if c.new is not None:
            rows = (sum(c.new) + 1,) if c.varlen_new else (batch, c.new[0])
            self.k_new = self.array(*rows, c.num_heads_kv, c.head_dim)
            self.v_new = self.array(*rows, c.num_heads_kv, c.head_dim_v)
            if c.varlen_new:
                self.set("cu_seqlens_k_new", cumulated(c.new))
        self.cos = self.sin = None
        if c.rotary_dim:
            angles = self.random.uniform(0, 6, (max(c.cached) + 40, c.rotary_dim // 2)).astype(np.float32)
            self.cos, self.sin = (self.embed(f(angles).astype(DTYPES[c.rotary_dtype]), 0) for f in (np.cos, np.sin))
            if c.rotary_seqlens is not None:
                self.set("rotary_seqlens", c.rotary_seqlens)

    def embed(self, values, padding):
        array, buffer = embedded(values.shape, values.dtype, np.nan, 32 + self.case.offset, padding)
        array[...] = values
        self.kept.append((array, buffer))
        return array

    def array(self, *shape):
        return self.embed(self.random.standard_normal(shape).astype(np.float32).astype(self.dtype), self.case.padding)

    def set(self, name, values):
        self.integers[name] = np.ascontiguousarray(values, np.int32)

    def params(self):
        c, p = self.case, forward_params.Params(struct_size=ctypes.sizeof(forward_params.Params))
        p.dtype = p.out_dtype = forward_params.DTYPES[c.dtype]
        p.batch, p.num_heads, p.num_heads_kv = c.batch, c.num_heads_kv * c.ratio, c.num_heads_kv
        p.head_dim, p.head_dim_v = c.head_dim, c.head_dim_v
        for name in ("q", "k", "v"):
            forward_params.set_rows(getattr(p, name), getattr(self, name))
        p.queries.rows, p.keys.rows = self.q.shape[-3], self.capacity
        p.mask = forward_params.Mask(c.causal, -1, -1, 0)
        of = {name: address(values) for name, values in self.integers.items()}.get
        p.queries.cu_seqlens, p.queries.seqused, p.keys.seqused = of("cu_seqlens_q"), of("seqused_q"), of("seqused_k")
        cache = p.cache
        if self.k_new is not None:
            forward_params.set_rows(cache.k_new, self.k_new)
            forward_params.set_rows(cache.v_new, self.v_new)
            cache.rows_new, cache.seqlen = self.k_new.shape[-3], c.cached[0]
        for name in ("cu_seqlens_k_new", "cache_batch_idx", "page_table", "rotary_seqlens"):
            setattr(cache, name, of(name))
        cache.batch_entries = cache.num_pages = len(self.k)
        if c.layout == "paged":
            cache.page_table_stride = cache.max_pages = self.max_pages
            cache.page_size = c.page_size
        if c.rotary_dim:
            cache.rotary_cos, cache.rotary_sin = address(self.cos), address(self.sin)
            cache.rotary_rows, cache.rotary_dim = len(self.cos), c.rotary_dim
            cache.rotary_dtype = forward_params.DTYPES[c.rotary_dtype]
            cache.rotary_interleaved = c.interleaved
        return p

    def run(self, host, fill):
        """(rotated q, lengths) out of the kernel, which has written no element around its arrays."""
        count = self.q.size
        rotated = np.full(count + 32, fill, self.dtype)
        size = rotated.itemsize
        start = -address(rotated) % 16 // size + 8
        seqlens_k = np.full(self.case.batch + 2, -7, np.int32)
        around = [self.outside(array, buffer) for array, buffer in self.kept]
        host.prepare_emulated(ctypes.byref(self.params()), address(rotated) + size * start, address(seqlens_k) + 4)
        for before, (array, buffer) in zip(around, self.kept, strict=True):
            assert before == self.outside(array, buffer), "written around an array"
        assert seqlens_k[0] == seqlens_k[-1] == -7
        poison = np.full(1, fill, self.dtype).tobytes()
        assert rotated[:start].tobytes() == poison * start
        assert rotated[start + count:].tobytes() == poison * (32 - start)
        return rotated[start:start + count].reshape(self.q.shape), seqlens_k[1:-1]

    @staticmethod
    def outside(array, buffer):
        held = array.copy()
        array[...] = 0
        bits = buffer.tobytes()
        array[...] = held
        return bits


def cumulated(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def same(found, expected):
    """Equal bits, or NaN in both."""
    nan = np.isnan(found.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    bits = f"u{found.itemsize}"
    return ((found.view(bits) == expected.view(bits)) | nan).all()


def as_the_cpu(call):
    """(k, v, rotated q, lengths) by the CPU's rules; 0 where q has rows that no sequence uses, NaN without rotary."""
    c, n = call.case, call.integers
    k, v = call.k.copy(), call.v.copy()
    sequences = find_sequences(
        call.q, k, batch=c.batch, max_seqlen_q=100, max_seqlen_k=1000, k_new=call.k_new, cu_seqlens_k=None,
        cache_leftpad=None, seqused_k=np.array(c.cached, np.int32), rotary_cos=call.cos, rotate_each_query=c.causal,
        **{name: n.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k_new", "seqused_q", "cache_batch_idx",
                                          "page_table", "rotary_seqlens")})
    rotate = None if call.cos is None else Rotary(call.cos, call.sin, c.interleaved, np.float32)
    q = np.full(call.q.shape, np.nan if rotate is None else 0, call.dtype)
    with np.errstate(all="ignore"):
        for sequence in sequences:
            if call.k_new is not None:
                append(sequence, k, v, call.k_new, call.v_new, rotate)
            if rotate is not None:
                rows = np.array(sequence.queries(call.q).swapaxes(0, 1), np.float32, order="C")
                rotate(rows, sequence.rotary_offset, each_row=c.causal)
                sequence.queries(q)[...] = rows.swapaxes(0, 1).astype(call.dtype)
    return k, v, q, [sequence.seqlen_k for sequence in sequences]


@settings(deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
@example(Case(cached=(5, 0), new=(3, 3), seqlens_q=(3, 3), rotary_dim=64, causal=True), 0)
@example(Case(cached=(5,), new=(3,), one_length=True, rotary_dim=32, interleaved=False, offset=1), 0)
@example(Case(cached=(2,) * 300, new=(1,) * 300, seqlens_q=(0,) * 300, head_dim=8, head_dim_v=8), 0)  # two blocks
@example(Case(cached=(7,), new=(2,), seqlens_q=(2,), num_heads_kv=3, ratio=7, head_dim=256, rotary_dim=256), 0)
def test_as_the_cpu(host, case, seed):
    call = Call(case, seed)
    for array in (call.q, call.k_new):
        if array is not None and array.size:
            for value in (np.nan, np.inf, -np.inf, -0.0):
                array[tuple(call.random.integers(size) for size in array.shape)] = value
    k, v, q, seqlens_k = as_the_cpu(call)
    rotated, lengths = call.run(host, np.nan)
    assert same(call.k, k) and same(call.v, v) and same(rotated, q)
    assert list(lengths) == (seqlens_k if case.new is not None else [-7] * case.batch)


garbage = st.one_of(st.integers(-3, 30), st.integers(INT_MIN, INT_MAX), st.sampled_from([INT_MIN, INT_MAX]))


@settings(deadline=None)
@given(cases(), st.data())
def test_arrays_that_lie(host, case, data):
    """No row outside an array is read (it is NaN) or written, and the lengths fit the cache."""
    call = Call(case, 0)
    for values in call.integers.values():
        lies = data.draw(st.lists(garbage, min_size=values.size, max_size=values.size))
        values[...] = np.array(lies, np.int32).reshape(values.shape)
    rotated, lengths = call.run(host, 0)
    for array in (call.k, call.v, rotated):
        assert not np.isnan(array.astype(np.float32)).any(), "read outside an array"
    if case.new is not None:
        assert ((lengths >= 0) & (lengths <= call.capacity)).all()


@pytest.mark.parametrize("layout", ["dense", "indexed", "paged"])
def test_rows_past_the_room_are_dropped(host, layout):
    case = Case(cached=(5, 9), new=(4, 4), layout=layout, room=3, seqlens_q=(1, 1))
    call = Call(case, 0)
    k, *_ = as_the_cpu(call)
    entries = call.integers.get("page_table", call.integers.get("cache_batch_idx", np.arange(2)))
    last = entries[1].flat[-1]
    call.integers["seqused_k"][1] = call.capacity - 1  # room for one of four
    before = call.k.copy()
    _, lengths = call.run(host, 0)
    assert list(lengths) == [9, call.capacity]
    assert (call.k[last, -1] == call.k_new[1, 0]).all() and (call.v[last, -1] == call.v_new[1, 0]).all()
    before[last, -1] = call.k_new[1, 0]
    before[entries[0]] = k[entries[0]]
    assert same(call.k, before)


def test_pages_past_the_table(host):
    """keys.rows may promise more rows than the table has pages for: what lies behind it is not looked up."""
    call = Call(Case(cached=(8,), new=(4,), layout="paged", room=0), 0)
    table = call.integers["page_table"]
    behind = np.concatenate([table[0], [0] * 100]).astype(np.int32)
    call.integers["page_table"] = behind[:table.size].reshape(table.shape)
    call.integers["seqused_k"][0] = call.capacity
    call.capacity += 100
    before = call.k.copy()
    call.run(host, 0)
    assert same(call.k, before)
