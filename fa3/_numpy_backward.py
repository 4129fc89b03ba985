"""The CPU backend's gradients: scores are made again tile by tile, from q, k and the lse that the forward gave.

With P the probabilities, M what dropout keeps of them over 1 - p, and D = sum(dout · out) of each query::

    dv = (P ∘ M)ᵀ · dout
    dS = P ∘ (M ∘ (dout · vᵀ) - D + dlse)
    dq = scale · dS · k,   dk = scale · dSᵀ · q,   dsinks = sum(exp(sink - lse) · (dlse - D))

Tiles, masks and arithmetic are those of the forward. The query heads of a KV head are stacked, so that products sum
dk and dv over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fa3._numpy import heads_first, nonfinite_rows, tile_sizes
from fa3._numpy_cache import Sequence, find_sequences
from fa3._numpy_softmax import Keys, Visible, add_product, hide, sees
from fa3._philox import Dropout


def backward(
    dout, q, k, v, out, lse, dq, dk, dv, dsinks, *, dlse=None,
    cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, sinks=None,
    batch, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, attention_chunk, softcap,
    dropout_p=0.0, dropout_seed=0,
):
    """Compute the gradients of attention into dq, dk, dv and dsinks (None without sinks).

    Parameters
    ----------
    dout, q, k, v, out, lse, dlse, dq, … : numpy.ndarray
        In the shapes in which the public functions take them, bf16 as ml_dtypes' type. Shapes and dtypes are
        checked by the caller; lengths and offsets are checked here.

    Raises
    ------
    ValueError
        Where a length or an offset does not fit; nothing has been written then.

    Notes
    -----
    Every row of dq, dk and dv is written: rows that no sequence has in use are read by no query, and get 0.
    """
    sequences = find_sequences(
        q, k, batch=batch, k_new=None, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, cu_seqlens_k_new=None,
        seqused_q=seqused_q, seqused_k=seqused_k, cache_batch_idx=None, cache_leftpad=None, page_table=None,
        rotary_cos=None, rotary_seqlens=None, rotate_each_query=False, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    num_heads, num_heads_kv = q.shape[-2], k.shape[-2]
    dtype = np.float64 if q.dtype == np.float64 else np.float32
    sink_sums = np.zeros(num_heads)
    for gradient in (dq, dk, dv):
        gradient[...] = 0
    with np.errstate(all="ignore"):  # NaN and inf are values like others here
        for sequence in sequences:
            if sequence.seqlen_q == 0 or num_heads == 0:
                continue
            task = _Task(
                q=sequence.queries(q), k=k, v=v, out=sequence.queries(out), lse=sequence.lse(lse),
                dout=sequence.queries(dout), dlse=None if dlse is None else sequence.lse(dlse),
                dq=sequence.queries(dq), dk=dk, dv=dv, sink_sums=sink_sums, sequence=sequence,
                visible=Visible(sequence.seqlen_q, sequence.seqlen_k, window_left, 0 if causal else window_right,
                                attention_chunk),
                scale=softmax_scale / (softcap if softcap > 0 else 1.0), softcap=softcap,
                sinks=None if sinks is None else sinks.astype(dtype),
                dropout=Dropout(dropout_p, dropout_seed) if dropout_p > 0 else None,
                group=num_heads // num_heads_kv, dtype=dtype,
            )
            task.run(num_heads_kv)
        if dsinks is not None:
            dsinks[...] = sink_sums


@dataclass(slots=True)
class _Rows:
    """A tile of queries: what belongs to each of its rows, (KV heads, group * queries, …)."""

    q: np.ndarray  # scaled
    dout: np.ndarray  # times what dropout's survivors are multiplied by
    delta: np.ndarray  # D - dlse
    shift: np.ndarray  # lse; 0 where there is none, for exponentials to be 0, not NaN
    nonfinite_q: np.ndarray | None
    nonfinite_dout: np.ndarray | None
    begin: np.ndarray  # (queries,): the first key that each sees, and the first after those
    end: np.ndarray


@dataclass(frozen=True, slots=True)
class _Task:
    """The gradients of one sequence."""

    q: np.ndarray  # (seqlen_q, num_heads, head_dim), as out, dout, dq; lse and dlse (num_heads, seqlen_q)
    k: np.ndarray  # whole arrays, as v, dk, dv: sequence.keys finds the rows
    v: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray | None
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    sink_sums: np.ndarray  # (num_heads,): grows by what this sequence gives
    sequence: Sequence
    visible: Visible
    scale: float  # of q, before the softcap's tanh
    softcap: float
    sinks: np.ndarray | None
    dropout: Dropout | None
    group: int  # query heads of a KV head
    dtype: type

    def run(self, num_heads_kv):
        seqlen_q, seqlen_k = self.visible.seqlen_q, self.visible.seqlen_k
        tile_q, tile_k, heads = tile_sizes(seqlen_q, seqlen_k, self.group, num_heads_kv)
        scratch = np.empty((2, heads * tile_q * self.group * tile_k), self.dtype)
        for first_head in range(0, num_heads_kv, heads):
            kv_heads = slice(first_head, min(first_head + heads, num_heads_kv))
            keys = self.load_keys(kv_heads)
            dk, dv = np.zeros_like(keys.k), np.zeros_like(keys.v)
            for m_first in range(0, seqlen_q, tile_q):
                queries = slice(m_first, min(m_first + tile_q, seqlen_q))
                self.tile(kv_heads, queries, keys, dk, dv, tile_k, scratch)
            for gradient, total in ((self.dk, dk), (self.dv, dv)):
                self.sequence.keys.read(gradient, 0, seqlen_k, kv_heads)[...] = total.swapaxes(0, 1)

    def load_keys(self, kv_heads):
        """k and v (heads, seqlen_k, dim), and which rows of k hold NaN or inf."""
        k, v = (heads_first(self.sequence.keys.read(array, 0, self.visible.seqlen_k, kv_heads), self.dtype)
                for array in (self.k, self.v))
        return Keys(k, v, nonfinite_rows(k))

    def load_rows(self, heads, queries, num_heads_kv):
        """The tile of these query heads and queries."""
        def stacked(array):
            return heads_first(array[queries, heads], self.dtype).reshape(num_heads_kv, -1, array.shape[-1])

        def column(array):
            return array[heads, queries].astype(self.dtype).reshape(num_heads_kv, -1, 1)

        begin, end = self.visible.bounds(queries.start, queries.stop)
        q, dout, shift = stacked(self.q) * self.dtype(self.scale), stacked(self.dout), column(self.lse)
        delta = (dout * stacked(self.out)).sum(axis=-1, keepdims=True)
        delta[:, np.tile(begin >= end, self.group)] = 0  # whatever out and dout hold where nothing is seen
        if self.dlse is not None:
            delta -= column(self.dlse)
        if self.dropout is not None:
            dout *= self.dtype(self.dropout.scale)
        shift[shift == -np.inf] = 0
        return _Rows(q, dout, delta, shift, nonfinite_rows(q), nonfinite_rows(dout), begin, end)

    def tile(self, kv_heads, queries, keys, dk, dv, tile_k, scratch):
        """Some queries of some KV heads: writes their dq, and adds what they give to dk, dv and the sinks."""
        num_heads_kv = kv_heads.stop - kv_heads.start
        heads = slice(kv_heads.start * self.group, kv_heads.stop * self.group)
        rows = self.load_rows(heads, queries, num_heads_kv)
        if self.dtype is np.float64:
            self.sharpen(rows, heads, keys, tile_k, scratch)
        dq = np.zeros_like(rows.q)
        for n in self.key_tiles(rows, tile_k):
            p, slope, hidden = self.probabilities(rows, keys, n, scratch)
            ds = scratch[1][:p.size].reshape(p.shape)
            np.matmul(rows.dout, keys.v[:, n].swapaxes(1, 2), out=ds)
            kept = p
            if self.dropout is not None:
                keep = self.dropout.keep(self.sequence.batch_index, heads, queries, n).reshape(p.shape)
                kept = p * keep
                ds *= keep
            ds -= rows.delta
            ds *= p
            if slope is not None:
                ds *= slope
            if hidden:
                hide(ds, 0, len(rows.begin), n.start, n.stop, rows.begin, rows.end)
            self.add_gradients(rows, keys, n, kept, ds, hidden, dq, dk, dv)
        dq *= self.dtype(self.scale)
        self.dq[queries, heads] = dq.reshape(-1, len(rows.begin), dq.shape[-1]).swapaxes(0, 1)
        if self.sinks is not None:
            weight = self.sink_weights(rows, heads)
            given = np.where(weight == 0, 0, weight * rows.delta)
            self.sink_sums[heads] -= given.reshape(heads.stop - heads.start, -1).sum(axis=1, dtype=np.float64)

    def key_tiles(self, rows, tile_k):
        first, last = int(rows.begin[0]), int(rows.end[-1])
        return [slice(n_first, min(n_first + tile_k, last)) for n_first in range(first, last, tile_k)]

    def probabilities(self, rows, keys, n, scratch):
        """P of a tile, the derivative of its softcap (or None), and whether any of its keys is hidden from a query."""
        p = scratch[0][:rows.q.shape[0] * rows.q.shape[1] * (n.stop - n.start)].reshape(*rows.q.shape[:2], -1)
        np.matmul(rows.q, keys.k[:, n].swapaxes(1, 2), out=p)
        slope = None
        if self.softcap > 0:
            np.tanh(p, out=p)
            slope = (1 - p * p) * self.dtype(self.softcap)
            p *= self.dtype(self.softcap)
        p -= rows.shift
        np.exp(p, out=p)
        # Last, and not to -inf before: a query that sees NaN has an lse of NaN, which must not reach other keys.
        return p, slope, hide(p, 0, len(rows.begin), n.start, n.stop, rows.begin, rows.end)

    def add_gradients(self, rows, keys, n, kept, ds, hidden, dq, dk, dv):
        """Three products; NaN and inf count for those alone who see them."""
        def seen():
            return sees(self.group, n.start, n.stop, rows.begin, rows.end)

        def seen_by():
            return seen().T

        nonfinite_k = None if keys.nonfinite is None or not hidden else keys.nonfinite[:, n]
        add_product(dv[:, n], kept.swapaxes(1, 2), rows.dout, rows.nonfinite_dout if hidden else None, seen_by)
        add_product(dk[:, n], ds.swapaxes(1, 2), rows.q, rows.nonfinite_q if hidden else None, seen_by)
        add_product(dq, ds, keys.k[:, n], nonfinite_k, seen)

    def sink_weights(self, rows, heads):
        """The share of each row's softmax that its head's sink has."""
        sinks = np.repeat(self.sinks[heads], len(rows.begin)).reshape(rows.shift.shape)
        return np.where(sinks == rows.shift, 1, np.exp(sinks - rows.shift))  # inf takes all

    def sharpen(self, rows, heads, keys, tile_k, scratch):
        """Make up for what the fp32 lse lacks in fp64: P of a row sums to 1 with its sink.

        Where it is further from 1 than that rounding can bring it, lse is one over more keys than these, and right.
        """
        total = np.zeros_like(rows.shift) if self.sinks is None else self.sink_weights(rows, heads)
        for n in self.key_tiles(rows, tile_k):
            total += self.probabilities(rows, keys, n, scratch)[0].sum(axis=-1, keepdims=True)
        rounded = np.abs(total - 1) <= np.abs(rows.shift) * 2.0**-23 + 2.0**-40
        rows.shift += np.where(rounded, np.log(total), 0)
