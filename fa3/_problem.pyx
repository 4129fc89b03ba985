"""The sizes of one call: read off q, k, v, then what every further argument is checked against."""

import numbers

import numpy

from fa3 import _checks as check

_INT32 = ("int32",)
_FLOAT32 = ("float32",)


class Problem:
    """What the arrays of one call agree on, and the views of q, k, v themselves.

    Attributes
    ----------
    q, k, v : ArrayView
    k_name, v_name : str
        What the caller calls the keys and values: ``k`` or ``k_cache``.
    batch, num_heads, num_heads_kv, head_dim, head_dim_v : int
    rows : tuple of int
        (batch, seqlen_q), or (total_q,) for a ragged q.
    max_seqlen_q, max_seqlen_k : int
        Rows of the longest sequence, or an upper bound of them.
    arrays : dict of str to ArrayView
        The optional arrays that were given, by name.
    """

    __slots__ = ("arrays", "batch", "head_dim", "head_dim_v", "k", "k_name", "max_seqlen_k", "max_seqlen_q",
                 "num_heads", "num_heads_kv", "on_gpu", "q", "rows", "v", "v_name")

    def __init__(self, border, k, v, k_name="k", v_name="v", dtype=None, written=False):
        self.on_gpu = border.device_type == check.CUDA
        self.q = q = border.view
        self.k = k = border.take(k, k_name, dtype, writable=written)
        self.v = v = border.take(v, v_name, dtype, writable=written)
        self.k_name, self.v_name = k_name, v_name
        self.arrays = {}
        check.dtype(q, "q", check.GPU_DTYPES if self.on_gpu else check.CPU_DTYPES)
        check.same_dtype(k, k_name, q, "q")
        check.same_dtype(v, v_name, q, "q")

    def ragged_q(self, border, cu_seqlens_q, max_seqlen_q):
        """Read batch and rows off q (total_q, num_heads, head_dim) and cu_seqlens_q (batch + 1,)."""
        q = self.q
        check.ndim(q, "q", 3, "(total_q, num_heads, head_dim)")
        total_q, self.num_heads, self.head_dim = q.shape
        view = border.take(cu_seqlens_q, "cu_seqlens_q")
        check.dtype(view, "cu_seqlens_q", _INT32)
        if view.ndim != 1 or not view.shape[0]:
            raise ValueError(f"cu_seqlens_q: shape {view.shape}, needs (batch + 1,)")
        if self.on_gpu:
            check.contiguous_rows(view, "cu_seqlens_q")
        self.arrays["cu_seqlens_q"] = view
        self.batch = view.shape[0] - 1
        self.rows = (total_q,)
        self.max_seqlen_q = _bound(max_seqlen_q, "max_seqlen_q", total_q)

    def dense_q(self):
        """Read batch and rows off q (batch, seqlen_q, num_heads, head_dim)."""
        check.ndim(self.q, "q", 4, "(batch, seqlen_q, num_heads, head_dim)")
        self.batch, self.max_seqlen_q, self.num_heads, self.head_dim = self.q.shape
        self.rows = (self.batch, self.max_seqlen_q)

    def ragged_k(self, max_seqlen_k):
        """Read the keys' sizes off k (total_k, num_heads_kv, head_dim)."""
        check.ndim(self.k, self.k_name, 3, "(total_k, num_heads_kv, head_dim)")
        self._kv("total_k")
        self.max_seqlen_k = _bound(max_seqlen_k, "max_seqlen_k", self.k.shape[0])

    def dense_k(self, any_batch=False):
        """Read the keys' sizes off k (batch, seqlen_k, num_heads_kv, head_dim), a cache's of `any_batch`."""
        check.ndim(self.k, self.k_name, 4, "(batch, seqlen_k, num_heads_kv, head_dim)")
        self._kv("batch", "seqlen_k")
        if not any_batch:
            check.same_size(self.k.shape[0], self.k_name, "batch", self.batch,
                            "cu_seqlens_q" if "cu_seqlens_q" in self.arrays else "q")
        self.max_seqlen_k = self.k.shape[1]

    def paged_k(self, border, page_table, max_seqlen_k=None):
        """Read the keys' sizes off pages (num_pages, page_size, num_heads_kv, head_dim) and their table."""
        check.ndim(self.k, self.k_name, 4, "(num_pages, page_size, num_heads_kv, head_dim)")
        self._kv("num_pages", "page_size")
        page_size = self.k.shape[1]
        if page_size < 1:
            raise ValueError(f"{self.k_name}: page_size 0, needs at least 1")
        view = border.take(page_table, "page_table")
        check.dtype(view, "page_table", _INT32)
        check.ndim(view, "page_table", 2, "(batch, max_pages)")
        check.same_size(view.shape[0], "page_table", "batch", self.batch,
                        "cu_seqlens_q" if "cu_seqlens_q" in self.arrays else "q")
        if self.on_gpu:
            check.contiguous_rows(view, "page_table")
        self.arrays["page_table"] = view
        self.max_seqlen_k = _bound(max_seqlen_k, "max_seqlen_k", view.shape[1] * page_size)

    def _kv(self, *row_axes):
        """Check k and v against q and each other, in all but q's batch."""
        k, v, k_name, v_name = self.k, self.v, self.k_name, self.v_name
        k_shape, v_shape = k.shape, v.shape
        if k.ndim != v.ndim:
            check.ndim(v, v_name, k.ndim, f"({', '.join(row_axes)}, num_heads_kv, head_dim_v)")
        check.same_size(k_shape[-1], k_name, "head_dim", self.head_dim, "q")
        if k_shape[:-1] != v_shape[:-1]:
            axes = (*row_axes, "num_heads_kv")
            for axis, v_size, k_size in zip(axes, v_shape[:-1], k_shape[:-1], strict=True):
                check.same_size(v_size, v_name, axis, k_size, k_name)
        self.num_heads_kv, self.head_dim_v = k_shape[-2], v_shape[-1]
        if self.head_dim < 1 or self.head_dim_v < 1:
            raise ValueError(f"{'q' if self.head_dim < 1 else v_name}: head_dim 0, needs at least 1")
        if self.num_heads_kv < 1 or self.num_heads % self.num_heads_kv:
            raise ValueError(f"{k_name}: num_heads_kv {self.num_heads_kv}, "
                             f"needs a divisor of q's num_heads {self.num_heads}")

    def take(self, border, dtype=None, **arrays):
        """Check and keep the optional arrays that are not None, each by the rule of its name."""
        for name, array in arrays.items():
            if array is not None:
                view = border.take(array, name, dtype if name in _TYPED else None)
                if dtype is not None and view.dtype == "uint16":  # rotary_cos, which may be float32 as well
                    view = border.take(array, name, dtype)
                _RULES[name](self, view, name)
                self.arrays[_KEYWORDS.get(name, name)] = view

    def use_cache(self, border, cache_seqlens):
        """Settle how much of the cache is in use, once the new keys have been taken."""
        new = self.arrays.get("k_new")
        if new is not None:
            check.no_overlap(self.k, self.k_name)
            check.no_overlap(self.v, self.v_name)
        if not isinstance(cache_seqlens, numbers.Integral):
            self.take(border, cache_seqlens=cache_seqlens)
            return
        rows = check.integer(cache_seqlens, "cache_seqlens", 0)
        room = self.max_seqlen_k - (new.shape[1] if new is not None and new.ndim == 4 else 0)
        if rows > room:
            raise ValueError(f"cache_seqlens: {rows}, needs at most {room}, the rows of {self.k_name}"
                             + (" less those of k" if new is not None else ""))
        if self.on_gpu and new is None:
            self.max_seqlen_k = rows  # a shorter cache, the same for all: no array has to be made on the GPU
        else:
            self.take(border, cache_seqlens=numpy.full(self.batch, rows, "int32"))

    def finish(self):
        """The checks that need all arrays: what the GPU's kernels ask of head dims and strides."""
        if self.on_gpu:
            check.head_dims(self.head_dim, self.head_dim_v, self.q.dtype, "qv" in self.arrays, self.v_name)
            check.contiguous_rows(self.q, "q")
            check.contiguous_rows(self.k, self.k_name)
            check.contiguous_rows(self.v, self.v_name)

    @property
    def out_shape(self):
        return (*self.rows, self.num_heads, self.head_dim_v)

    @property
    def lse_shape(self):
        """(batch, num_heads, seqlen_q), or (num_heads, total_q)."""
        return (*self.rows[:-1], self.num_heads, self.rows[-1])


def _bound(given, name, rows):
    """The longest sequence as far as it is known: what the caller says, and never more than all the rows."""
    return rows if given is None else min(check.integer(given, name, 0), rows)


def _per_sequence(problem, view, name):
    """int32 (batch,)."""
    check.dtype(view, name, _INT32)
    check.shape(view, name, (problem.batch,), "(batch,)")
    if problem.on_gpu:
        check.contiguous_rows(view, name)


def _cumulative(problem, view, name):
    """int32 (batch + 1,)."""
    check.dtype(view, name, _INT32)
    check.shape(view, name, (problem.batch + 1,), "(batch + 1,)")
    if problem.on_gpu:
        check.contiguous_rows(view, name)


def _sinks(problem, view, name):
    check.dtype(view, name, _FLOAT32)
    check.shape(view, name, (problem.num_heads,), "(num_heads,)")
    if problem.on_gpu:
        check.contiguous_rows(view, name)


def _qv(problem, view, name):
    check.same_dtype(view, name, problem.q, "q")
    check.shape(view, name, problem.out_shape, "q's shape with head_dim_v")
    if problem.on_gpu:
        check.contiguous_rows(view, name)


def _descale(problem, view, name):
    """fp32 of shape (), (num_heads_kv,) or (batch, num_heads_kv); q's also by num_heads."""
    if problem.q.dtype != check.FP8:
        raise ValueError(f"{name}: needs q of dtype {check.FP8}, but q has {problem.q.dtype}")
    check.dtype(view, name, _FLOAT32)
    heads = {problem.num_heads_kv, problem.num_heads} if name == "q_descale" else {problem.num_heads_kv}
    shape = view.shape
    if shape and (shape[-1] not in heads or shape[:-1] not in ((), (problem.batch,))):
        kinds = " or ".join(f"({head},) or ({problem.batch}, {head})" for head in sorted(heads))
        raise ValueError(f"{name}: shape {shape}, needs () or {kinds}: (num_heads,) or (batch, num_heads)")


def _new_rows(problem, view, name):
    """The keys or values to append, laid out as q is: with a batch axis, or ragged."""
    cache, head_dim = (problem.k, problem.head_dim) if name == "k" else (problem.v, problem.head_dim_v)
    check.same_dtype(view, name, cache, problem.k_name if name == "k" else problem.v_name)
    if "cu_seqlens_k_new" in problem.arrays:
        check.ndim(view, name, 3, "(total_k_new, num_heads_kv, head_dim), with cu_seqlens_k_new")
    else:
        check.ndim(view, name, 4, "(batch, seqlen_k_new, num_heads_kv, head_dim)")
        check.same_size(view.shape[0], name, "batch", problem.batch, "q")
    check.same_size(view.shape[-2], name, "num_heads_kv", problem.num_heads_kv, problem.k_name)
    check.same_size(view.shape[-1], name, "head_dim", head_dim,
                    problem.k_name if name == "k" else problem.v_name)
    if problem.on_gpu:
        check.contiguous_rows(view, name)
    if name == "v":
        new = problem.arrays["k_new"]
        if view.shape[:-1] != new.shape[:-1]:
            needed = (*new.shape[:-1], head_dim)
            raise ValueError(f"v: shape {view.shape}, needs {needed}, as k's {new.shape}")


def _rotary(problem, view, name):
    """cos or sin: (seqlen_rotary, rotary_dim / 2)."""
    allowed = _FLOAT32 + ((problem.q.dtype,) if problem.q.dtype in check.HALF else ())
    check.dtype(view, name, allowed)
    check.ndim(view, name, 2, "(seqlen_rotary, rotary_dim / 2)")
    rotary_dim = 2 * view.shape[1]
    if rotary_dim % 16 or not 0 < rotary_dim <= problem.head_dim:
        raise ValueError(f"{name}: rotary_dim {rotary_dim}, needs a multiple of 16 from 16 to q's head_dim "
                         f"{problem.head_dim}")
    if name == "rotary_sin":
        cos = problem.arrays["rotary_cos"]
        check.same_dtype(view, name, cos, "rotary_cos")
        check.shape(view, name, cos.shape, "as rotary_cos")
    if problem.on_gpu and view.strides != (view.shape[1], 1) and 0 not in view.shape:
        raise ValueError(f"{name}: strides {view.strides}, needs {(view.shape[1], 1)} on the GPU: contiguous")


_RULES = {
    "cu_seqlens_k": _cumulative,
    "cu_seqlens_k_new": _cumulative,
    "seqused_q": _per_sequence,
    "seqused_k": _per_sequence,
    "cache_seqlens": _per_sequence,
    "cache_batch_idx": _per_sequence,
    "cache_leftpad": _per_sequence,
    "rotary_seqlens": _per_sequence,
    "sinks": _sinks,
    "q_descale": _descale,
    "k_descale": _descale,
    "v_descale": _descale,
    "qv": _qv,
    "k": _new_rows,
    "v": _new_rows,
    "rotary_cos": _rotary,
    "rotary_sin": _rotary,
}
_TYPED = ("qv", "k", "v")  # what a call's `dtype=` speaks of, besides q and the keys and values
_KEYWORDS = {"k": "k_new", "v": "v_new", "cache_seqlens": "seqused_k"}  # what a backend calls them
