"""Calls of the server's day that are captured once, with the largest sizes, and replayed with any others."""

import numpy as np

import fa3


class Captured:
    """One call in place: its inputs are copied to where the graph reads them, for up to so many sequences.

    Of slots that nobody has the page table says -1, and their lengths are 0: what they would append is dropped. With
    `reads`, new rows have been written before the call, and queries turned.
    """

    def __init__(self, day, kind, slots, rows, reads):
        self.kind, self.slots, self.rows, self.reads, self._day = kind, slots, rows, reads, day
        arrays, model = day.arrays, day.model
        self._each = None if kind == "mix" else rows // slots  # queries of every sequence
        self._q, self._k, self._v = (
            arrays.poison((rows, heads, dim), model.dtype)
            for heads, dim in ((model.heads, model.head_dim), (model.heads_kv, model.head_dim),
                               (model.heads_kv, model.head_dim_v)))
        self._table = arrays.put(np.full((slots, day.max_pages), -1, np.int32))
        self._lengths, self._starts = (arrays.put(np.zeros(count, np.int32)) for count in (slots, slots + 1))
        self._metadata = fa3.get_scheduler_metadata(
            slots, self._each or day.load.chunk, day.max_pages * model.page_size, model.heads, model.heads_kv,
            model.head_dim, self._lengths, page_size=model.page_size)
        self._results = None
        self._replay = arrays.capture(self._call)

    def _call(self):
        day, model = self._day, self._day.model
        q, k, v = (day.arrays.typed(bits, model.dtype) for bits in (self._q, self._k, self._v))
        if self._each is None:
            given = {"cu_seqlens_q": self._starts, "max_seqlen_q": day.load.chunk}
            appended = {"k": k, "v": v, "cu_seqlens_k_new": self._starts}
        else:
            q, k, v = (x.reshape(self.slots, self._each, *x.shape[1:]) for x in (q, k, v))
            given, appended = {}, {"k": k, "v": v}
        given |= day.constants_of_reads if self.reads else appended | day.constants
        self._results = fa3.flash_attn_with_kvcache(
            q, day.pool.k, day.pool.v, page_table=self._table, cache_seqlens=self._lengths,
            scheduler_metadata=self._metadata, return_lse=True, **given, **model.options)

    def takes(self, batch):
        """Whether the graph is of such calls, and the batch is not too large for it."""
        return (batch.kind == self.kind and batch.written_first == self.reads and len(batch.counts) <= self.slots
                and batch.total <= self.rows and self._each in (None, batch.counts[0]))

    def replay(self, batch, q, k, v, table):
        """out (total, h, dv), lse: the batch's call."""
        put, count = self._day.arrays.put, len(batch.counts)
        for bits, new in ((self._q, q), (self._k, k), (self._v, v)):
            bits[:batch.total] = self._day.arrays.bits(new)
        self._table[:count], self._table[count:] = put(table), -1
        lengths = batch.lengths_after if self.reads else batch.lengths
        self._lengths[:count], self._lengths[count:] = put(lengths), 0
        self._starts[:count + 1], self._starts[count + 1:] = put(batch.starts), batch.total
        self._replay()
        out, lse = self._results
        return out.reshape(self.rows, *out.shape[-2:])[:batch.total], lse


def capture_graphs(day):
    """Small and large steps of decoding, four drafted tokens, a ragged mix: each appending, and reading alone."""
    few, many = day.load.graph_sequences, day.load.live + 8
    sizes = (("decode", few, few), ("decode", many, many), ("draft", few, 4 * few), ("mix", few, 3 * day.load.chunk))
    return [Captured(day, *size, reads) for size in sizes for reads in (False, True)]
