"""Attention problems for hypothesis, and the arrays that pose them.

Problems are drawn from simple to complex, so that what fails shrinks to something readable. Arrays are NumPy
(ml_dtypes for bf16 and fp8) inside buffers filled with NaN, so that a read outside a sequence shows in the
result and a write outside shows in the buffer.
"""

from dataclasses import dataclass, field, fields

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
          "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float32": np.dtype(np.float32),
          "float64": np.dtype(np.float64)}
DESCALES = ("one", "kv_heads", "heads", "batch_kv_heads", "batch_heads")  # k and v have those of KV heads
TILES = (64, 80, 96, 112, 128, 192)
EDGE_LENGTHS = (1, 2, 0, 7, 16, *sorted({tile + edge for tile in TILES for edge in (-1, 0, 1)}), 257, 400)
RATIOS = (1, 2, 3, 5, 6, 7, 8, 12, 66)  # 66: more heads than a packed tile holds
HEAD_DIMS = ((64, 64), (8, 8), (24, 24), (32, 32), (40, 40), (48, 48), (72, 72), (80, 80), (96, 96), (112, 112),
             (128, 128), (160, 160), (192, 192), (192, 128), (256, 256))
PLACEMENTS = ("contiguous", "sliced", "transposed", "broadcast")
# Multiply-adds of one problem, over all heads: the float64 reference takes about 0.05 s for it.
TOTAL_WORK = 2**25


@dataclass(frozen=True, repr=False)
class Problem:
    """One forward call, without its values."""

    seqlens_q: tuple[int, ...] = (1,)  # in use
    seqlens_k: tuple[int, ...] = (1,)
    num_heads_kv: int = 1
    ratio: int = 1  # query heads of a KV head
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "float16"
    varlen: bool = False
    padding_q: int | None = None  # rows that seqused_q hides; None: no seqused_q
    padding_k: int | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    sinks: bool = False
    descales: str | None = None  # of fp8: one of DESCALES
    placement_q: str = "contiguous"
    placement_kv: str = "contiguous"
    placement_out: str = "contiguous"
    num_splits: int = 0  # from here on: what must not change more than rounding
    pack_gqa: bool | None = None
    sm_margin: int = 0
    fp8_accumulate: int | None = None

    def __repr__(self):
        """What is not as in the simplest problem: a failure reads as what it takes."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Problem({', '.join(f'{name}={value!r}' for name, value in given)})"

    @property
    def batch(self):
        return len(self.seqlens_q)

    @property
    def num_heads(self):
        return self.num_heads_kv * self.ratio

    @property
    def work(self):
        pairs = sum(q * k for q, k in zip(self.seqlens_q, self.seqlens_k, strict=True))
        return pairs * self.num_heads * (self.head_dim + self.head_dim_v)

    @property
    def scale(self):
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def how(self):
        """The keywords that steer how the library goes about it."""
        return dict(num_splits=self.num_splits, pack_gqa=self.pack_gqa, sm_margin=self.sm_margin,
                    fp8_accumulate=self.fp8_accumulate)

    @property
    def formula(self):
        """The keywords of reference.attention that are not arrays."""
        return dict(scale=self.scale, causal=self.causal, window=self.window, chunk=self.chunk, softcap=self.softcap)


EMPTY_PROBLEMS = [  # no sequences, no queries, no keys
    Problem(seqlens_q=(seqlen_q,) * batch, seqlens_k=(seqlen_k,) * batch, num_heads_kv=2, ratio=2, varlen=varlen,
            sinks=sinks)
    for batch, seqlen_q, seqlen_k in [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0), (2, 0, 0)]
    for varlen in (False, True) for sinks in (False, True)]


@dataclass
class Arrays:
    """A problem's arrays. `out` and `lse` lie in poisoned buffers too."""

    q: np.ndarray  # (b, sq, h, d) or (total_q, h, d)
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    cu_seqlens_q: np.ndarray | None = None
    cu_seqlens_k: np.ndarray | None = None
    seqused_q: np.ndarray | None = None
    seqused_k: np.ndarray | None = None
    sinks: np.ndarray | None = None
    q_descale: np.ndarray | None = None
    k_descale: np.ndarray | None = None
    v_descale: np.ndarray | None = None
    max_seqlen_q: int = 0  # rows of the longest sequence's place, those that seqused hides included
    max_seqlen_k: int = 0
    buffers: dict = field(default_factory=dict)  # name -> (buffer, its bytes when made), of every array above

    @property
    def lengths(self):
        """The keywords that say where sequences lie; the same words in the library and in reference.forward."""
        names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
        return {name: getattr(self, name) for name in names}

    @property
    def descales(self):
        """The same for q_descale, k_descale and v_descale; none without them."""
        names = ("q_descale", "k_descale", "v_descale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def assert_only_written(self, out_used):
        """Fail if anything but the rows of out and lse that `out_used`, (b, sq) or (total_q,), marks has changed."""
        for name, (buffer, before) in self.buffers.items():
            if name in ("out", "lse"):
                view = getattr(self, name)
                used = out_used[..., None, None] if name == "out" else out_used[..., None, :]
                before = before.copy()
                np.copyto(_same_view(view, buffer, before), view, where=used)
            assert buffer.tobytes() == before.tobytes(), f"{name}: written outside the result"


def make(problem, seed=0, amplitude=1.0):
    """The arrays of a problem: normal values where sequences see them, NaN everywhere else."""
    rng = np.random.default_rng(seed)
    p = problem
    slots_q = _slots(p, p.seqlens_q, p.padding_q)
    slots_k = _slots(p, p.seqlens_k, p.padding_k)
    dtype = DTYPES[p.dtype]
    out_dtype = DTYPES["bfloat16"] if p.dtype == "float8_e4m3fn" else dtype
    buffers = {}

    def put(name, slots, seqlens, heads, dim, placement, shared=False):
        rows = [rng.standard_normal((length, 1 if shared else heads, dim)) * amplitude for length in seqlens]
        buffer, view = _place(slots, p.varlen, heads, dim, dtype, placement)
        for b, values in enumerate(rows):
            sequence_view(view, slots, b, p.varlen)[:len(values)] = values.astype(np.float32).astype(dtype)
        buffers[name] = (buffer, buffer.copy())
        return view

    q = put("q", slots_q, p.seqlens_q, p.num_heads, p.head_dim, p.placement_q, p.placement_q == "broadcast")
    k = put("k", slots_k, p.seqlens_k, p.num_heads_kv, p.head_dim, p.placement_kv, p.placement_kv == "broadcast")
    v = put("v", slots_k, p.seqlens_k, p.num_heads_kv, p.head_dim_v, p.placement_kv, p.placement_kv == "broadcast")
    buffer, out = _place(slots_q, p.varlen, p.num_heads, p.head_dim_v, out_dtype, p.placement_out)
    buffers["out"] = (buffer, buffer.copy())
    lse_shape = (p.num_heads, sum(slots_q)) if p.varlen else (p.batch, p.num_heads, max(slots_q, default=0))
    lse = np.full(lse_shape, np.nan, np.float32)
    buffers["lse"] = (lse, lse.copy())
    descales = {f"{name}_descale": _descale(p, name, rng) for name in "qkv"} if p.descales else {}
    return Arrays(
        q=q, k=k, v=v, out=out, lse=lse,
        cu_seqlens_q=_cumulated(slots_q) if p.varlen else None,
        cu_seqlens_k=_cumulated(slots_k) if p.varlen else None,
        seqused_q=None if p.padding_q is None else np.array(p.seqlens_q, np.int32),
        seqused_k=None if p.padding_k is None else np.array(p.seqlens_k, np.int32),
        sinks=rng.standard_normal(p.num_heads).astype(np.float32) * 2 if p.sinks else None,
        max_seqlen_q=max(slots_q, default=0), max_seqlen_k=max(slots_k, default=0), buffers=buffers,
        **descales,
    )


def _descale(problem, name, rng):
    """Factors between 1/2 and 2, in a view of odd strides."""
    kind = problem.descales
    heads = problem.num_heads if name == "q" and "kv" not in kind else problem.num_heads_kv
    shape = () if kind == "one" else (problem.batch, heads) if kind.startswith("batch") else (heads,)
    buffer = np.full(tuple(2 * n + 1 for n in shape), np.nan, np.float32)
    view = buffer[tuple(slice(1, None, 2) for _ in shape)] if shape else buffer
    view[...] = np.exp2(rng.uniform(-1, 1, shape))
    return view


def sequence_view(array, slots, b, varlen):
    """All rows of sequence b's place in a dense or varlen array: (slot, heads, dim)."""
    return array[sum(slots[:b]):sum(slots[:b + 1])] if varlen else array[b]


def place(values, placement, poison=np.nan):
    """A copy of `values` (…, rows, heads, dim) laid out by `placement` in a poisoned buffer: (buffer, view).

    contiguous: as it is. sliced: within a larger buffer on every side, starting off 16 bytes. transposed: heads
    before rows in memory. broadcast: one head in memory for all (the first one's values).
    """
    *lead, rows, heads, dim = values.shape
    if placement == "sliced":
        buffer = np.full((*(n + 2 for n in lead), rows + 3, heads + 1, dim + 5), poison, values.dtype)
        view = buffer[(*(slice(1, n + 1) for n in lead), slice(2, rows + 2), slice(0, heads), slice(3, dim + 3))]
    elif placement == "transposed":
        buffer = np.full((*lead, heads, rows, dim), poison, values.dtype)
        view = buffer.swapaxes(-3, -2)
    elif placement == "broadcast":
        buffer = np.full((*lead, rows, min(heads, 1), dim), poison, values.dtype)
        strides = (*buffer.strides[:-2], 0, buffer.strides[-1])
        view = np.lib.stride_tricks.as_strided(buffer, values.shape, strides)
        buffer[...] = values[..., :1, :]
        return buffer, view
    else:
        buffer = view = np.full(values.shape, poison, values.dtype)
    view[...] = values
    return buffer, view


def _place(slots, varlen, heads, dim, dtype, placement):
    shape = (sum(slots), heads, dim) if varlen else (len(slots), max(slots, default=0), heads, dim)
    return place(np.full(shape, np.nan, dtype), placement)


def _slots(problem, seqlens, padding):
    """Rows that each sequence has in its array: those in use and those that seqused hides."""
    slots = [length + (padding or 0) for length in seqlens]
    return slots if problem.varlen else [max(slots, default=0)] * len(slots)


def _cumulated(slots):
    return np.concatenate([[0], np.cumsum(slots)]).astype(np.int32)


def _same_view(view, buffer, other):
    """The part of `other` that lies there as `view` lies in `buffer`."""
    offset = view.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]
    return np.ndarray(view.shape, view.dtype, other, offset if view.size else 0, view.strides)


@st.composite
def lengths(draw, batch, budget):
    """Lengths (seqlens_q, seqlens_k), edges among them, whose products are at most `budget`."""
    seqlens_q, seqlens_k = [], []
    for _ in range(batch):
        seqlen_q = draw(_length(budget))
        longest = budget // max(1, seqlen_q)
        seqlens_q.append(seqlen_q)
        seqlens_k.append(seqlen_q if seqlen_q <= longest and draw(st.booleans()) else draw(_length(longest)))
    return tuple(seqlens_q), tuple(seqlens_k)


def _length(longest):
    longest = max(1, min(longest, max(EDGE_LENGTHS)))
    return st.sampled_from([n for n in EDGE_LENGTHS if n <= longest]) | st.integers(1, longest)


@st.composite
def masks(draw):
    """causal, window and chunk as a dict."""
    kind = draw(st.sampled_from(["full", "causal", "window", "causal window", "chunk", "causal chunk"]))
    side = st.integers(-1, 5) | st.sampled_from([15, 63, 64, 65, 127, 300])
    window = (-1, -1)
    if kind == "window":
        window = (draw(side), draw(side))
    elif kind == "causal window":
        window = (draw(side), draw(st.sampled_from([-1, 0, 3])))  # causal makes it 0, whatever it says
    chunk = draw(st.sampled_from([1, 2, 16, 63, 64, 100, 128, 1000])) if "chunk" in kind else 0
    return dict(causal="causal" in kind, window=window, chunk=chunk)


@st.composite
def problems(draw, dtypes=("float16", "bfloat16"), head_dims=HEAD_DIMS, ratios=RATIOS, placements=PLACEMENTS,
             max_batch=4, total_work=TOTAL_WORK):
    """A Problem whose work is at most `total_work`."""
    dtype = draw(st.sampled_from(dtypes))
    head_dim, head_dim_v = draw(st.sampled_from(head_dims))
    fp8 = dtype == "float8_e4m3fn"
    if fp8:  # a GPU takes multiples of 16
        head_dim, head_dim_v = (-(-dim // 16) * 16 for dim in (head_dim, head_dim_v))
    ratio = draw(st.sampled_from(ratios))
    num_heads_kv = draw(st.integers(1, 3))
    batch = draw(st.sampled_from([*range(1, max_batch + 1)] * 3 + [0]))
    varlen = draw(st.booleans())
    padding_q = draw(st.none() | st.sampled_from([0, 1, 5, 64]))
    padding_k = draw(st.none() | st.sampled_from([0, 1, 5, 64]))
    budget = total_work // (max(batch, 1) * num_heads_kv * ratio * (head_dim + head_dim_v))
    seqlens_q, seqlens_k = draw(lengths(batch, budget))
    if not varlen and batch:  # dense sequences without seqused are of one length
        seqlens_q = seqlens_q if padding_q is not None else (min(seqlens_q),) * batch
        seqlens_k = seqlens_k if padding_k is not None else (min(seqlens_k),) * batch
    return Problem(
        seqlens_q=seqlens_q, seqlens_k=seqlens_k, num_heads_kv=num_heads_kv, ratio=ratio, head_dim=head_dim,
        head_dim_v=head_dim_v, dtype=dtype, varlen=varlen, padding_q=padding_q, padding_k=padding_k,
        **draw(masks()), softcap=draw(st.sampled_from([0.0, 0.0, 1.0, 15.0, 50.0])),
        softmax_scale=draw(st.none() | st.sampled_from([1.0, 0.25, 0.0, -0.1])), sinks=draw(st.booleans()),
        descales=draw(st.none() | st.sampled_from(DESCALES)) if fp8 else None,
        placement_q=draw(st.sampled_from(placements)), placement_kv=draw(st.sampled_from(placements)),
        placement_out=draw(st.sampled_from([p for p in placements if p != "broadcast"])),
        num_splits=draw(st.sampled_from([0, 0, 1, 2, 3, 7, 1000])), pack_gqa=draw(st.sampled_from([None, False, True])),
        sm_margin=draw(st.sampled_from([0, 0, 500])),  # 500: one multiprocessor has to do it all
        fp8_accumulate=draw(st.sampled_from([None, 0, 1, 192, 10**9])) if fp8 else None,
    )
