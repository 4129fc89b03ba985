"""The CPU backend: exact attention by blocked online softmax over BLAS products.

Each sequence is computed by itself, a few KV heads and a tile of queries at a time: the query heads of a
KV head are stacked into one product. Nothing larger than a tile of scores is ever made, so memory grows
with seqlen_q + seqlen_k, and what a sequence gives does not depend on what else is in the batch.
Arithmetic is fp32, or fp64 where q is fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fa3._numpy_cache import Rotary, Sequence, append, find_sequences, rounded
from fa3._numpy_softmax import Keys, OnlineSoftmax, Visible, merge
from fa3._philox import Dropout

# A tile has about TILE_ROWS rows (queries times heads of a KV head) and TILE_SCORES scores, 2 MiB in fp32.
# Measured at seqlen 2,048 and head_dim 64 and 128: fewer scores make more calls into BLAS, each of which
# waits for its threads; more rows make a causal mask hide more of what is computed.
TILE_ROWS = 256
TILE_SCORES = 256 * 2048
MIN_TILE_KEYS = 256


def forward(
    q, k, v, out, lse, *, k_new=None, v_new=None, qv=None,
    cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None,
    rotary_cos=None, rotary_sin=None, rotary_seqlens=None, rotary_interleaved=True,
    q_descale=None, k_descale=None, v_descale=None, sinks=None,
    batch, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right,
    attention_chunk, softcap, num_splits, batch_invariant, pack_gqa, sm_margin, fp8_accumulate=0, dropout_p=0.0,
    dropout_seed=0, seqused_k_name="seqused_k",
):
    """Compute attention into `out` and `lse` (which may be None), appending new keys to k and v in place.

    Parameters
    ----------
    q, k, v, out, lse, … : numpy.ndarray
        In the shapes in which the public functions take them; bf16 and fp8 as ml_dtypes types. Shapes and
        dtypes are checked by the caller; values (lengths, offsets, pages) are checked here.
    max_seqlen_k, pack_gqa, sm_margin, fp8_accumulate
        Change nothing in the result: a sequence is always computed by itself, its query heads packed.
    seqused_k_name : str
        What the caller calls seqused_k, for messages.
    batch_invariant
        Keeps the keys in one part: `num_splits` is cut to the batch's longest sequence before it comes here.

    Raises
    ------
    ValueError
        Where a length, an offset or a page does not fit; nothing has been written then.

    Notes
    -----
    Rows of `out` and `lse` that belong to no query in use are left as they are. With `qv`, descales apply to
    what each array holds: q_descale to q and qv, k_descale to k, v_descale to v in both its places.
    """
    right = 0 if causal else window_right
    rotate_each_query = bool(causal or window_left >= 0 or window_right >= 0 or attention_chunk > 0)
    sequences = find_sequences(
        q, k, batch=batch, k_new=k_new, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        cu_seqlens_k_new=cu_seqlens_k_new, seqused_q=seqused_q, seqused_k=seqused_k,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, page_table=page_table,
        rotary_cos=rotary_cos, rotary_seqlens=rotary_seqlens, rotate_each_query=rotate_each_query,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_k_name=seqused_k_name,
    )
    dtype = np.float64 if q.dtype == np.float64 else np.float32
    num_heads, num_heads_kv = q.shape[-2], k.shape[-2]
    # NaN and inf are values like others here, and rows that see nothing take log(0): no warnings.
    with np.errstate(all="ignore"):
        rotate = None if rotary_cos is None else Rotary(rotary_cos, rotary_sin, rotary_interleaved, dtype)
        if k_new is not None:
            for sequence in sequences:
                append(sequence, k, v, k_new, v_new, rotate)
        q_descale = _per_head(q_descale, batch, num_heads, dtype)
        k_descale = _per_head(k_descale, batch, num_heads, dtype)
        v_descale = _per_head(v_descale, batch, num_heads, dtype)
        sinks = None if sinks is None else sinks.astype(dtype)
        dropout = Dropout(dropout_p, dropout_seed) if dropout_p > 0 else None
        for sequence in sequences:
            if sequence.seqlen_q == 0 or num_heads == 0:
                continue
            b = sequence.batch_index
            scale_out = v_descale[b] if dropout is None else v_descale[b] * dtype(dropout.scale)
            task = _Task(
                q=sequence.queries(q), qv=None if qv is None else sequence.queries(qv), k=k, v=v,
                out=sequence.queries(out), lse=None if lse is None else sequence.lse(lse), sequence=sequence,
                visible=Visible(sequence.seqlen_q, sequence.seqlen_k, window_left, right, attention_chunk),
                scale_qk=softmax_scale * q_descale[b] * k_descale[b],
                scale_qv=softmax_scale * q_descale[b] * v_descale[b], scale_out=scale_out, sinks=sinks, softcap=softcap,
                dropout=dropout, num_splits=1 if batch_invariant else max(1, num_splits), rotate=rotate,
                rotate_each_query=rotate_each_query, group=num_heads // num_heads_kv, dtype=dtype,
            )
            task.run(num_heads_kv)


def combine(out_partial, lse_partial, out, lse):
    """Combine the results of splits of the keys.

    Parameters
    ----------
    out_partial : numpy.ndarray
        (splits, batch, seqlen, num_heads, head_dim_v); what a split that saw nothing holds does not matter.
    lse_partial : numpy.ndarray
        (splits, batch, seqlen, num_heads); -inf where a split saw nothing.
    out, lse : numpy.ndarray
        (batch, seqlen, num_heads, head_dim_v) and (batch, seqlen, num_heads), to be written; lse may be None.
    """
    dtype = np.float64 if out_partial.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        for b in range(out.shape[0]):  # entry by entry, to keep the temporaries small
            merged, merged_lse = merge(
                [partial[b].astype(dtype) for partial in out_partial], lse_partial[:, b].astype(dtype)
            )
            out[b] = merged
            if lse is not None:
                lse[b] = merged_lse


@dataclass(frozen=True, slots=True)
class _Task:
    """The attention of one sequence."""

    q: np.ndarray  # (seqlen_q, num_heads, head_dim), as qv and out; lse (num_heads, seqlen_q)
    qv: np.ndarray | None
    k: np.ndarray  # whole arrays: sequence.keys reads them
    v: np.ndarray
    out: np.ndarray
    lse: np.ndarray | None
    sequence: Sequence
    visible: Visible
    scale_qk: np.ndarray  # (num_heads,), as scale_qv and scale_out: softmax scale and descales
    scale_qv: np.ndarray
    scale_out: np.ndarray  # of what dropout keeps, too
    sinks: np.ndarray | None
    softcap: float
    dropout: Dropout | None
    num_splits: int
    rotate: Rotary | None
    rotate_each_query: bool
    group: int  # query heads of a KV head
    dtype: type

    def run(self, num_heads_kv):
        seqlen_q, seqlen_k = self.visible.seqlen_q, self.visible.seqlen_k
        tile_q, tile_k, heads = tile_sizes(seqlen_q, seqlen_k, self.group, num_heads_kv)
        scratch = np.empty(heads * tile_q * self.group * tile_k, self.dtype)
        for first_head in range(0, num_heads_kv, heads):
            kv_heads = slice(first_head, min(first_head + heads, num_heads_kv))
            keys = self.load_keys(kv_heads)
            for m_first in range(0, seqlen_q, tile_q):
                self.tile(kv_heads, m_first, min(m_first + tile_q, seqlen_q), keys, tile_k, scratch)

    def load_keys(self, kv_heads):
        """k (heads, seqlen_k, dim), joined by v where qv is multiplied with it, and v."""
        first, count = self.sequence.first_key, self.sequence.seqlen_k
        k = self.sequence.keys.read(self.k, first, count, kv_heads)
        v = self.sequence.keys.read(self.v, first, count, kv_heads)
        if self.qv is None:
            k, v = heads_first(k, self.dtype), heads_first(v, self.dtype)
        else:
            k = np.concatenate([heads_first(k, self.dtype), heads_first(v, self.dtype)], axis=-1)
            v = k[..., -v.shape[-1]:]
        return Keys(k, v, nonfinite_rows(v))

    def load_queries(self, heads, m_first, m_last):
        """q (heads, rows, dim), scaled, joined by qv where there is one."""
        divisor = self.softcap if self.softcap > 0 else 1.0
        q = heads_first(self.q[m_first:m_last, heads], self.dtype)
        if self.rotate is not None:
            position = self.sequence.rotary_offset + (m_first if self.rotate_each_query else 0)
            self.rotate(q, position, each_row=self.rotate_each_query)
            q = rounded(q, self.q.dtype).astype(self.dtype)  # as the turned keys are in the cache
        q *= (self.scale_qk[heads] / divisor)[:, None, None]
        if self.qv is None:
            return q
        qv = heads_first(self.qv[m_first:m_last, heads], self.dtype)
        qv *= (self.scale_qv[heads] / divisor)[:, None, None]
        return np.concatenate([q, qv], axis=-1)

    def tile(self, kv_heads, m_first, m_last, keys, tile_k, scratch):
        """Queries [m_first, m_last) of some KV heads: all their keys, then out and lse."""
        group, rows = self.group, m_last - m_first
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        num_heads_kv = kv_heads.stop - kv_heads.start
        q = self.load_queries(heads, m_first, m_last).reshape(num_heads_kv, group * rows, -1)
        begin, end = self.visible.bounds(m_first, m_last)
        first, last = int(begin[0]), int(end[-1])
        split = -(-(last - first) // self.num_splits)
        partials = []
        for i in range(self.num_splits):
            softmax = OnlineSoftmax(num_heads_kv, group, rows, keys.v.shape[-1], self.dtype)
            if i == 0 and self.sinks is not None:
                softmax.start_from(self.sinks[heads])
            split_last = min(last, first + (i + 1) * split)
            for n_first in range(first + i * split, split_last, tile_k):
                n_last = min(n_first + tile_k, split_last)
                s = scratch[:q.shape[0] * q.shape[1] * (n_last - n_first)].reshape(*q.shape[:2], -1)
                np.matmul(q, keys.k[:, n_first:n_last].swapaxes(1, 2), out=s)
                if self.softcap > 0:
                    np.tanh(s, out=s)
                    s *= self.softcap
                keep = None
                if self.dropout is not None:
                    keep = self.dropout.keep(self.sequence.batch_index, heads, slice(m_first, m_last),
                                             slice(n_first, n_last)).reshape(s.shape)
                softmax.add(s, keys, n_first, n_last, begin, end, keep)
            partials.append(softmax.finish())
        out, lse = partials[0]
        if len(partials) > 1:
            out, lse = merge([partial[0] for partial in partials], np.stack([p[1] for p in partials]))
        out = out.reshape(-1, rows, out.shape[-1])
        out *= self.scale_out[heads, None, None]
        self.out[m_first:m_last, heads] = out.swapaxes(0, 1)
        if self.lse is not None:
            self.lse[heads, m_first:m_last] = lse.reshape(-1, rows)


def tile_sizes(seqlen_q, seqlen_k, group, num_heads_kv):
    """Queries and keys of a tile, and the KV heads that are computed together."""
    tile_q = min(seqlen_q, max(1, TILE_ROWS // group))
    rows = tile_q * group
    tile_k = max(1, min(seqlen_k, max(MIN_TILE_KEYS, TILE_SCORES // rows)))
    return tile_q, tile_k, min(num_heads_kv, max(1, TILE_SCORES // (rows * tile_k)))


def heads_first(rows, dtype):
    """(rows, heads, dim) of any dtype and strides as a new contiguous (heads, rows, dim) in `dtype`."""
    if rows.dtype.itemsize == 1:  # fp8: a table of its 256 values is several times faster than a cast
        table = np.arange(256, dtype=np.uint8).view(rows.dtype).astype(dtype)
        return table[rows.view(np.uint8).swapaxes(0, 1)]
    return np.array(rows.swapaxes(0, 1), dtype=dtype, order="C")


def nonfinite_rows(array):
    """Which rows of an array (heads, rows, dim) hold NaN or inf; None where none does."""
    if np.isfinite(array.sum()):  # any NaN or inf shows in the sum
        return None
    rows = ~np.isfinite(array).all(axis=-1)
    return rows if rows.any() else None


def _per_head(descale, batch, num_heads, dtype):
    """A descale, () or (heads,) or (batch, heads), for each query head: (batch, num_heads)."""
    if descale is None:
        return np.ones((batch, num_heads), dtype)
    descale = np.asarray(descale, dtype=dtype)
    if descale.ndim and descale.shape[-1] not in (1, num_heads):  # per KV head
        descale = np.repeat(descale, num_heads // descale.shape[-1], axis=-1)
    return np.broadcast_to(descale, (batch, num_heads))
