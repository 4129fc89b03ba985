"""Which keys a query sees, and the online softmax over them: one tile of queries, some keys at a time.

Shapes: `heads` counts KV heads, and `rows` the queries of a tile; the `group` query heads of a KV head are
stacked, so that a tile has group * rows rows in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Visible:
    """Which keys each query of a sequence sees. Query i stands at position i + seqlen_k - seqlen_q."""

    seqlen_q: int
    seqlen_k: int
    left: int  # -1: unbounded
    right: int  # -1: unbounded
    chunk: int  # 0: no chunks

    def bounds(self, first, last):
        """For queries [first, last): the first key each sees, and the first key after those it sees.

        Both only grow from one query to the next, and the first never passes the second.
        """
        furthest = self.seqlen_q + self.seqlen_k  # no distance is longer: keeps huge windows within int64
        position = np.arange(first, last) + (self.seqlen_k - self.seqlen_q)
        begin = np.zeros_like(position)
        end = np.full_like(position, self.seqlen_k)
        if self.left >= 0:
            begin = np.maximum(begin, position - min(self.left, furthest))
        if self.right >= 0:
            end = np.minimum(end, position + min(self.right, furthest) + 1)
        if self.chunk > 0:
            chunk = min(self.chunk, furthest)
            chunk_begin = position // chunk * chunk
            begin = np.maximum(begin, chunk_begin)
            end = np.minimum(end, chunk_begin + chunk)
        return begin.clip(0, self.seqlen_k), end.clip(0, self.seqlen_k)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys and values of some KV heads of a sequence, in the compute dtype."""

    k: np.ndarray  # (heads, seqlen_k, head_dim)
    v: np.ndarray  # (heads, seqlen_k, head_dim_v)
    nonfinite: np.ndarray | None  # (heads, seqlen_k): values that hold NaN or inf; None: there are none


class OnlineSoftmax:
    """A tile's running softmax: row_max, row_sum and the sum of values they weight, all (heads, rows, …)."""

    def __init__(self, heads, group, rows, head_dim_v, dtype):
        self.group, self.rows = group, rows
        self.row_max = np.full((heads, group * rows, 1), -np.inf, dtype)
        self.row_sum = np.zeros((heads, group * rows, 1), dtype)
        self.acc = np.zeros((heads, group * rows, head_dim_v), dtype)
        self.product = np.empty_like(self.acc)

    def start_from(self, sinks):
        """Let each head's sink be the first logit: it joins the denominator and has no value."""
        self.row_max[...] = np.repeat(sinks, self.rows).reshape(self.row_max.shape)
        self.row_sum[...] = self.row_max != -np.inf

    def add(self, s, keys, n_first, n_last, begin, end, keep=None):
        """Take in the scores s (heads, group * rows, keys) of keys [n_first, n_last); s is used up.

        Of the values, those alone count whose weights dropout keeps: `keep` is of s's shape, or None.
        """
        hidden = hide(s, -np.inf, self.rows, n_first, n_last, begin, end)
        new_max = s.max(axis=-1, keepdims=True)
        np.maximum(new_max, self.row_max, out=new_max)
        # A row that has seen nothing yet has maximum -inf: subtract 0, for its exponentials to be 0, not NaN.
        shift = np.where(new_max == -np.inf, 0, new_max)
        s -= shift
        p = np.exp(s, out=s)
        correction = np.where(self.row_max == new_max, 1, np.exp(self.row_max - shift))  # both inf: a sink's
        self.row_sum *= correction
        self.row_sum += np.matmul(p, np.ones(n_last - n_first, p.dtype))[..., None]
        self.acc *= correction
        self.row_max = new_max
        if keep is not None:
            p *= keep
        nonfinite = keys.nonfinite[:, n_first:n_last] if hidden and keys.nonfinite is not None else None
        add_product(self.acc, p, keys.v[:, n_first:n_last], nonfinite,
                    lambda: sees(self.group, n_first, n_last, begin, end), self.product)

    def finish(self):
        """out (heads, group * rows, head_dim_v), lse (heads, group * rows); 0 and -inf where nothing is seen."""
        lse = (self.row_max + np.log(self.row_sum))[..., 0]
        self.acc /= np.where(self.row_sum == 0, 1, self.row_sum)
        return self.acc, lse


def hide(tile, value, rows, n_first, n_last, begin, end):
    """Set a tile (heads, group * rows, keys) to `value` where a query does not see a key; say if that is anywhere."""
    tile = tile.reshape(tile.shape[0], -1, rows, tile.shape[-1])
    columns = np.arange(n_first, n_last)
    left = min(int(begin[-1]), n_last) - n_first  # columns before it are hidden from some query
    right = max(int(end[0]), n_first) - n_first  # columns from it on are hidden from some query
    if left > 0:
        np.copyto(tile[..., :left], value, where=columns[:left] < begin[:, None])
    if right < len(columns):
        np.copyto(tile[..., right:], value, where=columns[right:] >= end[:, None])
    return left > 0 or right < len(columns)


def sees(group, n_first, n_last, begin, end):
    """Which keys [n_first, n_last) the rows of a tile see: bool (group * rows, keys)."""
    columns = np.arange(n_first, n_last)
    return np.tile((columns >= begin[:, None]) & (columns < end[:, None]), (group, 1))


def add_product(acc, weights, rows, nonfinite, seen, product=None):
    """acc += weights @ rows, where rows that hold NaN or inf count for those alone who see them: 0 * NaN is NaN.

    Parameters
    ----------
    acc, weights, rows : numpy.ndarray
        (heads, m, dim), (heads, m, n) and (heads, n, dim).
    nonfinite : numpy.ndarray of bool or None
        (heads, n): rows that hold NaN or inf; None: there are none, or all see them.
    seen : callable
        Makes bool (m, n): which of the m see which of the n rows.
    product : numpy.ndarray, optional
        Room for a product, of acc's shape.
    """
    if nonfinite is not None and nonfinite.any():
        by_row = seen().T
        for head, j in np.argwhere(nonfinite):
            acc[head][by_row[j]] += weights[head][by_row[j], j, None] * rows[head, j]
        rows = np.where(nonfinite[..., None], 0, rows)
    acc += np.matmul(weights, rows, out=product)


def merge(outs, lses):
    """Join results over disjoint keys: outs, a list of (…, dim), and lses (splits, …) become one of each."""
    lse_max = lses.max(axis=0)
    lse_max = np.where(lse_max == -np.inf, 0, lse_max)
    weights = np.where(lses == lse_max, 1, np.exp(lses - lse_max))  # inf - inf is NaN, of a sink too
    total = weights.sum(axis=0)
    divisor = np.where(total == 0, 1, total)
    merged = np.zeros_like(outs[0])
    for out, lse, weight in zip(outs, lses, weights, strict=True):
        # A part that saw nothing may hold anything, NaN too.
        merged += np.where((lse == -np.inf)[..., None], 0, out * (weight / divisor)[..., None])
    return merged, lse_max + np.log(total)
