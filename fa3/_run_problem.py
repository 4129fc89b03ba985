"""What ``fa3 run`` computes: random sequences of the lengths asked for, and the call that takes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np

from ._reference_check import Formula, Masking, Packed

DTYPES = {"fp8": np.dtype(ml_dtypes.float8_e4m3fn), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


# Options of the forward that change no gradient.
_FORWARD_ALONE = ("num_splits", "batch_invariant", "pack_gqa", "fp8_accumulate", "out_dtype", "return_lse")


@dataclass(frozen=True)
class Lengths:
    """Rows allocated for each sequence, and how many of them are in use."""

    allocated: np.ndarray
    used: np.ndarray

    @property
    def cumulative(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.allocated)]).astype(np.int32)

    @property
    def total(self) -> int:
        return int(self.allocated.sum())

    @property
    def longest(self) -> int:
        return int(self.allocated.max(initial=0))


@dataclass
class Problem:
    """Inputs as NumPy arrays, in the layout of the public functions, with what the check needs to know."""

    dtype: str
    q_lengths: Lengths
    k_lengths: Lengths
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    qv: np.ndarray | None
    formula: Formula
    page_size: int = 0
    options: dict = field(default_factory=dict)  # plain values for the call, by the public functions' names
    arrays: dict = field(default_factory=dict)  # likewise, arrays that go to the device
    backward_options: dict = field(default_factory=dict)  # plain values for the gradients' call alone

    @property
    def packed(self) -> Packed:
        return Packed(self.q_lengths.cumulative[:-1], self.q_lengths.used,
                      self.k_lengths.cumulative[:-1], self.k_lengths.used)

    @property
    def flops(self) -> int:
        """Two products over the visible (query, key) pairs of every head, counted sequence by sequence."""
        head_dim = self.q.shape[-1] + self.v.shape[-1] * (1 if self.qv is None else 2)
        pairs = sum(self.formula.masking.visible_pairs(int(sq), int(sk))
                    for sq, sk in zip(self.q_lengths.used, self.k_lengths.used, strict=True))
        return 2 * pairs * self.q.shape[1] * head_dim

    @property
    def backward_flops(self) -> int:
        """Five products: three over head_dim, two over that of v."""
        head_dim, head_dim_v = self.q.shape[-1], self.v.shape[-1]
        return self.flops // (head_dim + head_dim_v) * (3 * head_dim + 2 * head_dim_v)

    def backward_bytes_moved(self) -> int:
        """Each row in use of q, k, v, out and dout read once, and of dq, dk and dv written once."""
        rows_q, rows_k = int(self.q_lengths.used.sum()), int(self.k_lengths.used.sum())
        columns_q = self.q.shape[1] * (2 * self.q.shape[-1] + 2 * self.v.shape[-1])
        columns_k = self.k.shape[1] * 2 * (self.k.shape[-1] + self.v.shape[-1])
        return (rows_q * columns_q + rows_k * columns_k) * self.q.dtype.itemsize

    def bytes_moved(self, out_itemsize: int) -> int:
        """Each row in use of q, k, v read once and of out written once."""
        heads, rows_q, rows_k = self.q.shape[1], int(self.q_lengths.used.sum()), int(self.k_lengths.used.sum())
        read = rows_q * heads * self.q.shape[-1] + rows_k * self.k.shape[1] * (self.k.shape[-1] + self.v.shape[-1])
        if self.qv is not None:
            read += rows_q * heads * self.v.shape[-1]
        return read * self.q.dtype.itemsize + rows_q * heads * self.v.shape[-1] * out_itemsize

    def describe(self) -> str:
        """The configuration on one line."""
        heads, kv_heads = self.q.shape[1], self.k.shape[1]
        head_dim, head_dim_v = self.q.shape[-1], self.v.shape[-1]
        parts = [
            self.dtype,
            f"batch_size {len(self.q_lengths.used)}",
            f"seqlen_q {_range(self.q_lengths.used)}",
            f"seqlen_k {_range(self.k_lengths.used)}",
            f"heads {heads}" + (f" on {kv_heads}" if kv_heads != heads else ""),
            f"head_size {head_dim}" + (f"/{head_dim_v}" if head_dim_v != head_dim else ""),
            "causal" if self.formula.masking.causal else "full" if self.formula.masking.is_full else "masked",
        ]
        parts += [name if value is True else f"{name} {value}"
                  for name, value in (self.options | self.backward_options).items() if name != "causal"]
        parts += self.arrays
        if self.page_size:
            parts.append(f"page_size {self.page_size}")
        return ", ".join(parts)

    def call(self, device, **more):
        """Bind the arrays to `device`; the result is a function without arguments that calls fa3 once."""
        import fa3

        options = {**self.options, **{name: device.put(array) for name, array in self.arrays.items()}, **more}
        named = device.named_dtype(self.q.dtype)
        if named is not None:
            options["dtype"] = named
        if self.qv is not None:
            options["qv"] = device.put(self.qv)
        k, v = self.k, self.v
        if self.page_size:
            k, v, page_table = self._paged()
            options["page_table"] = device.put(page_table)
        arrays = [device.put(a) for a in (self.q, k, v, self.q_lengths.cumulative, self.k_lengths.cumulative)]
        longest = self.q_lengths.longest, self.k_lengths.longest
        return lambda: fa3.flash_attn_varlen_func(*arrays, *longest, **options)

    def backward_call(self, device, dout, out, lse):
        """The same for the gradients; `out` and `lse` are the device's own."""
        import fa3

        given = ["qv"] * (self.qv is not None) + ["page_size"] * bool(self.page_size)
        given += [name for name in self.arrays if name.endswith("descale")]
        if given:
            raise ValueError(f"--backward: given with --{given[0]}, which is of the forward alone")
        options = {name: value for name, value in self.options.items() if name not in _FORWARD_ALONE}
        options |= self.backward_options
        options |= {name: device.put(array) for name, array in self.arrays.items()}
        named = device.named_dtype(self.q.dtype)
        if named is not None:
            options["dtype"] = named
        arrays = [device.put(dout), *(device.put(a) for a in (self.q, self.k, self.v)), out, lse]
        arrays += [device.put(lengths.cumulative) for lengths in (self.q_lengths, self.k_lengths)]
        longest = self.q_lengths.longest, self.k_lengths.longest
        return lambda: fa3.flash_attn_varlen_backward(*arrays, *longest, **options)

    def _paged(self):
        """The same keys and values, cut into pages that lie in shuffled order; what no sequence owns is NaN."""
        size, lengths = self.page_size, self.k_lengths
        pages = -(-lengths.allocated // size)
        order = np.random.default_rng(0).permutation(int(pages.sum())).astype(np.int32)
        table = np.zeros((len(pages), max(1, int(pages.max(initial=0)))), dtype=np.int32)
        k_pages = np.full((len(order), size, *self.k.shape[1:]), np.nan).astype(self.k.dtype)
        v_pages = np.full((len(order), size, *self.v.shape[1:]), np.nan).astype(self.v.dtype)
        taken = 0
        for b, (start, length) in enumerate(zip(lengths.cumulative, lengths.allocated, strict=False)):
            mine = order[taken:taken + pages[b]]
            table[b, :len(mine)] = mine
            taken += len(mine)
            rows = np.arange(length)
            k_pages[mine[rows // size], rows % size] = self.k[start:start + length]
            v_pages[mine[rows // size], rows % size] = self.v[start:start + length]
        return k_pages, v_pages, table


def make_problem(args) -> Problem:
    """Turn the parsed flags of ``fa3 run`` into lengths, random arrays and options."""
    for name in ("num_heads", "num_heads_k", "head_size", "head_size_v"):
        if getattr(args, name) == 0:
            raise ValueError(f"--{name}: 0, needs at least 1")
    if args.deterministic and not args.backward:
        raise ValueError("--deterministic: given without --backward, which alone can take it")
    rng = np.random.default_rng(args.seed)
    q_lengths, k_lengths = _lengths(args, rng)
    dtype = DTYPES[args.dtype]
    heads = args.num_heads
    kv_heads = heads if args.num_heads_k is None else args.num_heads_k
    head_dim_v = args.head_size if args.head_size_v is None else args.head_size_v

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    q = normal(q_lengths.total, heads, args.head_size)
    k = normal(k_lengths.total, kv_heads, args.head_size)
    v = normal(k_lengths.total, kv_heads, head_dim_v)
    qv = normal(q_lengths.total, heads, head_dim_v) if args.qv else None
    unused = ~_in_use(k_lengths)
    k[unused], v[unused] = np.nan, np.nan  # rows past seqused must never touch a result

    batch = len(q_lengths.used)
    arrays = {}
    if args.seqused_q:
        arrays["seqused_q"] = q_lengths.used.astype(np.int32)
    if args.seqused_k:
        arrays["seqused_k"] = k_lengths.used.astype(np.int32)
    if args.sinks:
        arrays["sinks"] = rng.standard_normal(heads, dtype=np.float32)
    for name, columns in (("q_descale", heads), ("k_descale", kv_heads), ("v_descale", kv_heads)):
        if getattr(args, name) is not None:
            arrays[name] = np.full((batch, columns), getattr(args, name), dtype=np.float32)

    scale = args.softmax_scale
    if scale is None:
        scale = (args.head_size + (head_dim_v if args.qv else 0)) ** -0.5
    masking = Masking(args.causal, *args.window_size, args.attention_chunk)
    formula = Formula(scale, masking, args.softcap, arrays.get("sinks"), arrays.get("q_descale"),
                      arrays.get("k_descale"), arrays.get("v_descale"), args.dropout_p, _dropout_seed(args) or 0)
    options = {name: value for name, (value, default) in _options(args).items() if value != default}
    return Problem(args.dtype, q_lengths, k_lengths, q, k, v, qv, formula, args.page_size, options, arrays,
                   {"deterministic": True} if args.deterministic else {})


def _options(args):
    """Options that go to the call as they are: name -> (value, the function's default)."""
    return {
        "causal": (args.causal, False),
        "softmax_scale": (args.softmax_scale, None),
        "window_size": (tuple(args.window_size), (-1, -1)),
        "attention_chunk": (args.attention_chunk, 0),
        "softcap": (args.softcap, 0.0),
        "num_splits": (args.num_splits, 0),
        "batch_invariant": (args.batch_invariant, False),
        "pack_gqa": (args.pack_gqa, None),
        "sm_margin": (args.sm_margin, 0),
        "fp8_accumulate": (args.fp8_accumulate, None),
        "dropout_p": (args.dropout_p, 0.0),
        "dropout_seed": (_dropout_seed(args), None),
        "out_dtype": (None if args.out_dtype is None else DTYPES[args.out_dtype].name, None),
        "return_lse": (args.return_lse, False),
    }


def _dropout_seed(args):
    """That of all else, unless it is given."""
    return args.seed if args.dropout_seed is None and args.dropout_p else args.dropout_seed


def _lengths(args, rng):
    if args.seqlens is not None and args.seqlens_file is not None:
        raise ValueError("--seqlens: given with --seqlens_file, which says the lengths too")
    if args.seqlens is not None or args.seqlens_file is not None:
        given = _given_lengths(args.seqlens, args.seqlens_file)
        q_allocated, k_allocated = given, given if args.seqlens_k is None else parse_seqlens(args.seqlens_k)
        if len(k_allocated) != len(q_allocated):
            raise ValueError(f"--seqlens_k: {len(k_allocated)} lengths, but the queries have {len(q_allocated)}")
    elif args.seqlens_k is not None:
        raise ValueError("--seqlens_k: given without --seqlens or --seqlens_file, and needs the queries' lengths")
    else:
        max_q = args.max_seqlen_q
        max_k = max_q if args.max_seqlen_k is None else args.max_seqlen_k
        q_allocated = _draw(max_q, args.batch_size, args.fixed, rng)
        # equal maxima mean self-attention, where q and k are the same tokens
        k_allocated = q_allocated if max_k == max_q else _draw(max_k, args.batch_size, args.fixed, rng)
    q_used = rng.integers(0, q_allocated, endpoint=True) if args.seqused_q else q_allocated
    k_used = rng.integers(0, k_allocated, endpoint=True) if args.seqused_k else k_allocated
    return Lengths(q_allocated, q_used), Lengths(k_allocated, k_used)


def _draw(longest, batch, fixed, rng):
    """`batch` lengths of 1 … longest, of which one is the longest itself."""
    lengths = np.full(batch, longest, dtype=np.int64)
    if not fixed and longest > 1 and batch > 1:
        lengths[1:] = rng.integers(1, longest, size=batch - 1, endpoint=True)
    return lengths


def parse_seqlens(text: str) -> np.ndarray:
    """``"64x21,48x7,100"``: 21 lengths of 64, 7 of 48 and one of 100."""
    lengths = []
    for item in text.split(","):
        length, _, count = item.strip().partition("x")
        if not length.isdecimal() or not (count or "1").isdecimal():
            raise ValueError(f"--seqlens: {item!r}, needs LENGTH or LENGTHxCOUNT, joined by commas")
        lengths += [int(length)] * int(count or 1)
    return np.array(lengths, dtype=np.int64)


def _given_lengths(text, path):
    if text is not None:
        return parse_seqlens(text)
    ends = json.loads(Path(path).read_text())
    if isinstance(ends, dict):
        ends = ends.get("cu_seqlens")
    if not _are_cumulative(ends):
        raise ValueError(f"--seqlens_file: {path} needs a list of cumulative lengths that starts at 0 and never falls, "
                         'or {"cu_seqlens": list}')
    return np.diff(np.array(ends, dtype=np.int64))


def _are_cumulative(ends):
    return (isinstance(ends, list) and all(type(end) is int for end in ends) and ends[:1] == [0]
            and all(end <= following for end, following in pairwise(ends)))


def _in_use(lengths):
    in_use = np.zeros(lengths.total, dtype=bool)
    for start, used in zip(lengths.cumulative, lengths.used, strict=False):
        in_use[start:start + used] = True
    return in_use


def _range(lengths):
    if not len(lengths):
        return "none"
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest == longest:
        return f"{longest:,}"
    return f"{shortest:,}…{longest:,} ({int(lengths.sum()):,} tokens)"
