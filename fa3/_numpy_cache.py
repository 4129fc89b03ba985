"""Where each sequence of a batch lies: dense, varlen and paged rows, appended keys, rotary positions.

This half of the CPU backend looks at lengths, offsets and pages, and refuses what does not fit before
anything is written; `fa3._numpy` does the attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_E4M3 = np.float32(448)


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of one sequence lie in k and v (dense, varlen or paged), by their number in it."""

    index: int | None = None  # dense: the batch entry, or the cache entry that cache_batch_idx names
    start: int = 0  # varlen: the first row
    pages: np.ndarray | None = None  # paged: the sequence's row of the page table
    page_size: int = 0

    def read(self, array, first, count, heads):
        """Rows [first, first + count) of the heads that a slice names: (count, heads, dim)."""
        if self.pages is not None:
            if count == 0:
                return array[0:0, 0, heads]
            first_page = first // self.page_size
            used = self.pages[first_page:_ceil_div(first + count, self.page_size)]
            rows = array[used, :, heads]
            rows = rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])
            first -= first_page * self.page_size
            return rows[first:first + count]
        rows = array if self.index is None else array[self.index]
        return rows[self.start + first:self.start + first + count, heads]

    def write(self, array, first, rows):
        """Put `rows` (count, heads, dim) at row `first`."""
        if self.pages is not None:
            at = np.arange(first, first + len(rows))
            array[self.pages[at // self.page_size], at % self.page_size] = rows
        else:
            target = array if self.index is None else array[self.index]
            target[self.start + first:self.start + first + len(rows)] = rows


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of the batch: which rows of every array are its own."""

    batch_index: int
    query_start: int | None  # first row of q, out and lse when they are varlen, None when they are dense
    seqlen_q: int
    keys: Rows
    first_key: int  # rows of the cache before it are left padding
    seqlen_k: int  # visible keys, those just appended included
    append_at: int  # the cache's row for the first new key
    new_start: int | None  # first row of k_new when that is varlen
    seqlen_new: int
    rotary_offset: int

    def queries(self, array):
        """This sequence's rows of q, qv or out: (seqlen_q, heads, dim)."""
        return _batch_rows(array, self.batch_index, self.query_start, self.seqlen_q)

    def lse(self, array):
        """This sequence's part of lse: (heads, seqlen_q)."""
        if self.query_start is None:
            return array[self.batch_index, :, :self.seqlen_q]
        return array[:, self.query_start:self.query_start + self.seqlen_q]

    def new(self, array):
        """This sequence's rows of k_new or v_new: (seqlen_new, heads, dim)."""
        return _batch_rows(array, self.batch_index, self.new_start, self.seqlen_new)


def find_sequences(
    q, k, *, batch, max_seqlen_q, max_seqlen_k, k_new, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new,
    seqused_q, seqused_k, cache_batch_idx, cache_leftpad, page_table, rotary_cos, rotary_seqlens, rotate_each_query,
    seqused_k_name="seqused_k",
):
    """Find every sequence's rows, or raise ValueError naming the argument that does not fit.

    flash_attn_with_kvcache hands its cache_seqlens over as seqused_k; `seqused_k_name` is what the caller says.
    """
    query_starts, rows_q = _spans("cu_seqlens_q", cu_seqlens_q, q, batch)
    seqlens_q = _used("seqused_q", seqused_q, rows_q)
    _check_maximum("max_seqlen_q", max_seqlen_q, seqlens_q)

    keys, capacities = _key_rows(k, batch, cu_seqlens_k, cache_batch_idx, page_table)
    cached = _used(seqused_k_name, seqused_k, capacities)
    _check_maximum("max_seqlen_k", max_seqlen_k, cached)

    if k_new is None:
        new_starts, seqlens_new = [None] * batch, [0] * batch
    else:
        new_starts, seqlens_new = _spans("cu_seqlens_k_new", cu_seqlens_k_new, k_new, batch)
        for b, (length, new, capacity) in enumerate(zip(cached, seqlens_new, capacities, strict=True)):
            if new > capacity:
                raise ValueError(f"k: {new} rows for sequence {b}, but it has room for {capacity}")
            if length + new > capacity:
                raise ValueError(f"{seqused_k_name}: sequence {b} has {length} keys and gets {new}, but has room "
                                 f"for {capacity}")

    leftpads = [0] * batch if cache_leftpad is None else _integers(cache_leftpad)
    for b, (leftpad, length) in enumerate(zip(leftpads, cached, strict=True)):
        if not 0 <= leftpad <= length:
            raise ValueError(f"cache_leftpad: {leftpad} for sequence {b}, but it must be within 0 and {length}, the "
                             "sequence's length in the cache")

    offsets = cached if rotary_seqlens is None else _integers(rotary_seqlens)
    found = [
        Sequence(
            batch_index=b, query_start=query_starts[b], seqlen_q=seqlens_q[b],
            keys=keys[b], first_key=leftpads[b], seqlen_k=cached[b] - leftpads[b] + seqlens_new[b],
            append_at=cached[b], new_start=new_starts[b], seqlen_new=seqlens_new[b], rotary_offset=offsets[b],
        )
        for b in range(batch)
    ]
    if page_table is not None:
        _check_pages(found, len(k))
    if rotary_cos is not None:
        _check_rotary(found, len(rotary_cos), rotate_each_query)
    return found


def append(sequence, k, v, k_new, v_new, rotate):
    """Write a sequence's new keys and values into its cache; `rotate` (or None) turns the keys first."""
    if sequence.seqlen_new == 0:
        return
    rows = sequence.new(k_new)
    if rotate is not None:
        rows = np.array(rows.swapaxes(0, 1), dtype=rotate.dtype, order="C")
        rotate(rows, sequence.rotary_offset, each_row=True)
        rows = rounded(rows.swapaxes(0, 1), k.dtype)
    sequence.keys.write(k, sequence.append_at, rows.astype(k.dtype, copy=False))
    sequence.keys.write(v, sequence.append_at, sequence.new(v_new).astype(v.dtype, copy=False))


def rounded(x, dtype):
    """x in `dtype`. e4m3 has no infinity, and a cast past 448 gives NaN: such numbers become ±448, as on the GPU."""
    return (np.clip(x, -MAX_E4M3, MAX_E4M3) if dtype.itemsize == 1 else x).astype(dtype)


class Rotary:
    """Rotary embedding: pairs of the first rotary_dim elements of a row turned by the row's position."""

    def __init__(self, cos, sin, interleaved, dtype):
        self.cos, self.sin, self.dtype = cos.astype(dtype), sin.astype(dtype), dtype
        self.interleaved = interleaved

    def __call__(self, x, position, *, each_row):
        """Turn x (heads, rows, dim) in place: row i as at `position` + i, or all rows as at `position`."""
        positions = slice(position, position + (x.shape[-2] if each_row else 1))
        cos, sin = self.cos[positions], self.sin[positions]
        half = cos.shape[-1]
        if self.interleaved:
            first, second = x[..., 0:2 * half:2], x[..., 1:2 * half:2]
        else:
            first, second = x[..., :half], x[..., half:2 * half]
        turned = first * cos - second * sin
        second *= cos
        second += first * sin
        first[...] = turned


def _batch_rows(array, index, start, count):
    return array[index, :count] if start is None else array[start:start + count]


def _integers(array):
    return [int(i) for i in array]


def _ceil_div(a, b):
    return -(-a // b)


def _spans(name, cu_seqlens, array, batch):
    """First row (None: dense) and number of rows of each sequence in `array`."""
    if cu_seqlens is None:
        return [None] * batch, [array.shape[1]] * batch
    return cumulated(name, cu_seqlens, len(array))


def cumulated(name, cu_seqlens, total):
    ends = _integers(cu_seqlens)
    if ends[0] != 0:
        raise ValueError(f"{name}: begins with {ends[0]}, but it must begin with 0")
    for b, (start, end) in enumerate(pairwise(ends)):
        if end < start:
            raise ValueError(f"{name}: falls from {start} to {end} at entry {b + 1}, but it must not fall")
    if total is not None and ends[-1] > total:
        raise ValueError(f"{name}: ends with {ends[-1]}, but the array has {total} rows")
    return ends[:-1], [end - start for start, end in pairwise(ends)]


def _used(name, seqused, lengths):
    if seqused is None:
        return lengths
    used = _integers(seqused)
    for b, (count, length) in enumerate(zip(used, lengths, strict=True)):
        if not 0 <= count <= length:
            raise ValueError(f"{name}: {count} for sequence {b}, but it must be within 0 and {length}, "
                             "the rows that it has")
    return used


def _check_maximum(name, maximum, lengths):
    for b, length in enumerate(lengths):
        if length > maximum:
            raise ValueError(f"{name}: {maximum}, but sequence {b} has {length} rows")


def _key_rows(k, batch, cu_seqlens_k, cache_batch_idx, page_table):
    """Where each sequence's keys lie, and for how many there is room."""
    if page_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: given with page_table, but a paged cache has no batch entries")
        page_size = k.shape[1]
        table = np.asarray(page_table, dtype=np.int64)
        rows = [Rows(pages=table[b], page_size=page_size) for b in range(batch)]
        capacities = [table.shape[1] * page_size] * batch
        if cu_seqlens_k is not None:  # says the lengths alone: there are no rows in a row
            capacities = _used("cu_seqlens_k", cumulated("cu_seqlens_k", cu_seqlens_k, None)[1], capacities)
        return rows, capacities
    if cu_seqlens_k is not None:
        starts, lengths = _spans("cu_seqlens_k", cu_seqlens_k, k, batch)
        return [Rows(start=start) for start in starts], lengths
    entries = range(batch) if cache_batch_idx is None else _integers(cache_batch_idx)
    for b, entry in enumerate(entries):
        if not 0 <= entry < len(k):
            raise ValueError(f"cache_batch_idx: {entry} for sequence {b}, but the cache has {len(k)} entries")
    return [Rows(index=entry) for entry in entries], [k.shape[1]] * batch


def _check_pages(found, num_pages):
    """Every page that holds a visible or a new row must exist; what other entries say does not matter."""
    for sequence in found:
        rows = sequence.keys
        last = sequence.first_key + sequence.seqlen_k
        if sequence.seqlen_k == 0:
            continue
        for entry in range(sequence.first_key // rows.page_size, _ceil_div(last, rows.page_size)):
            page = int(rows.pages[entry])
            if not 0 <= page < num_pages:
                raise ValueError(f"page_table: page {page} at [{sequence.batch_index}, {entry}], "
                                 f"but there are {num_pages} pages")


def _check_rotary(found, num_positions, rotate_each_query):
    for sequence in found:
        first = sequence.rotary_offset
        rows_q = sequence.seqlen_q if rotate_each_query else min(sequence.seqlen_q, 1)
        rows = max(rows_q, sequence.seqlen_new)
        if rows and first < 0:  # a length is never negative: only rotary_seqlens can say this
            raise ValueError(f"rotary_seqlens: {first} for sequence {sequence.batch_index}, "
                             "but a position must not be negative")
        if rows and first + rows > num_positions:
            raise ValueError(f"rotary_cos: {num_positions} positions, but sequence {sequence.batch_index} "
                             f"needs {first + rows}")
