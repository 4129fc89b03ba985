"""Which probabilities dropout keeps: Philox4x32-10 [1]_ of the seed at (batch, head, query, key), in NumPy.

The layout, which a GPU kernel follows to the bit. Batch, query and key count within the call and the sequence (key 0
is the sequence's first key, wherever it lies), heads are those of q. One call of Philox gives 4 words of 32 bits, and
serves 8 elements, 2 queries times 4 keys of a 16 x 16 block::

    counter = (4 · (key // 16) + key % 8 // 2,  8 · (query // 16) + query % 8,  head,  batch)
    key     = (seed % 2**32,  seed // 2**32)
    word    = query % 16 // 8 + 2 · (key % 16 // 8)
    half    = key % 2, of the word's two 16 bits: 0 the low ones

An element is kept if its 16 bits are at least `threshold`, which is p · 2**16, rounded, at most 2**16 - 1. What is
kept is multiplied by 1 / (1 - p). So p counts in steps of 1/65,536; the 8 bits of other libraries, in steps of 1/256,
would drop 0.1016 for 0.1.

Why so. In the accumulator of a Hopper product, which becomes the A operand of the next one, lane l of a warp holds in
each 16 x 16 block rows l // 4 and l // 4 + 8 of columns 2 · (l % 4), the next one, and both 8 further on, in four
registers of two. In the forward rows are queries, and one call is just that: word i masks register i, half to half.
Where the backward has keys as rows, a lane's 8 elements are halves of two calls, and lane l ^ 4 needs the other halves
of the same two: each makes one call, and they exchange two words. No bit is thrown away in either, tiles need only
begin at multiples of 16, and whatever computes an element alone can do so too.

.. [1] J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
ROUNDS = 10


def philox4x32(counter, seed):
    """Philox4x32-10.

    Parameters
    ----------
    counter : sequence of 4 arrays of uint64
        Each below 2**32; they broadcast against each other.
    seed : int
        Below 2**64: the key.

    Returns
    -------
    list of 4 arrays of uint64
        Each below 2**32.
    """
    c0, c1, c2, c3 = counter
    keys = [seed & _MASK, seed >> 32]
    low, word = np.uint64(_MASK), np.uint64(32)
    for _ in range(ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> word) ^ c1 ^ np.uint64(keys[0]), second & low
        c2, c3 = (first >> word) ^ c3 ^ np.uint64(keys[1]), first & low
        keys = [(key + step) & _MASK for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return [c0, c1, c2, c3]


@dataclass(frozen=True, slots=True)
class Dropout:
    """A call's dropout: which elements it keeps, and what these are multiplied by."""

    p: float  # 0 < p < 1, in fp32 too: the C interface has a float
    seed: int

    @property
    def threshold(self):
        """An element's 16 bits are at least this if it is kept."""
        return min(int(np.rint(np.float32(self.p) * np.float32(65536))), 65535)

    @property
    def scale(self):
        return 1 / (1 - self.p)

    def keep(self, batch, heads, queries, keys):
        """Which elements of a tile are kept.

        Parameters
        ----------
        batch : int
        heads, queries, keys : slice
            Of query heads, and of queries and keys by their number in the sequence; none of them empty.

        Returns
        -------
        numpy.ndarray of bool
            (heads, queries, keys).
        """
        query_blocks, key_blocks = _blocks(queries), _blocks(keys)
        head = np.arange(heads.start, heads.stop, dtype=np.uint64)
        words = philox4x32(
            (np.arange(4 * key_blocks.start, 4 * key_blocks.stop, dtype=np.uint64),
             np.arange(8 * query_blocks.start, 8 * query_blocks.stop, dtype=np.uint64)[:, None],
             head[:, None, None], np.uint64(batch)), self.seed)
        rows, columns = len(query_blocks), len(key_blocks)
        bits = np.empty((len(head), rows, 2, 8, columns, 2, 4), "<u4")
        for i, word in enumerate(words):
            bits[:, :, i % 2, :, :, i // 2] = word.reshape(len(head), rows, 8, columns, 4)
        bits = bits.view("<u2").reshape(len(head), 16 * rows, 16 * columns)
        first_query, first_key = 16 * query_blocks.start, 16 * key_blocks.start
        return bits[:, queries.start - first_query:queries.stop - first_query,
                    keys.start - first_key:keys.stop - first_key] >= self.threshold


def _blocks(rows):
    """The blocks of 16 that hold some rows."""
    return range(rows.start // 16, -(-rows.stop // 16))
