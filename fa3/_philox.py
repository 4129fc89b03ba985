"""Which probabilities dropout keeps: Philox4x32-10 [1]_ of the seed at (batch, head, query, key), in NumPy.

The layout, which a GPU kernel follows to the bit. Batch, query and key count within the call and the sequence (key 0
is the sequence's first key, wherever it lies), heads are those of q. One call of Philox gives 4 words of 32 bits, and
serves 16 elements, 2 queries times 8 keys of a block of 16 x 32::

    counter = (head,  4 · (key // 32) + key % 8 // 2,  batch,  8 · (query // 16) + query % 8)
    key     = (seed % 2**32,  seed // 2**32)
    word    = query % 16 // 8 + 2 · (key % 16 // 8)
    turned  = the word, its bits turned right by 8 if key % 32 // 16
    bits    = the lower 15 of the half key % 2 of that, 0 being the lower half

An element is dropped if its 15 bits are below p · 2**15, rounded and at most 2**15 - 1; of p above 1/2, what is not
below (1 - p) · 2**15. What is kept is multiplied by 1 / (1 - p). So p counts in steps of 1/32,768; the 8 bits of other
libraries, in steps of 1/256, would drop 0.1016 for 0.1.

Why so. In the accumulator of a Hopper product, which becomes the A operand of the next one, lane l of a warp holds in
each 16 x 16 block rows l // 4 and l // 4 + 8 of columns 2 · (l % 4), the next one, and both 8 further on, in four
registers of two. In the forward rows are queries, and one call is just that of two blocks: word i masks register i of
the first, and turned that of the second, half to half. Where the backward has keys as rows, a lane's elements are
halves of two calls, and lane l ^ 4 needs the other halves of the same two: each makes one call, and they exchange. A
GPU compares the 15 bits of both halves at once, as if they were numbers of 16 bits that have lost their sign, which
only the thresholds up to 1/2 allow. Tiles need only begin at multiples of 16, and whatever computes an element alone
can do so too.

The lower 8 of an element's bits are among the upper ones of another element, 16 keys away. They decide in 1 case of
128, so that these two are dropped together a little more often than by chance: their correlation is 0.002 at p = 0.1,
and 0.004 at most. And head and batch stand in the counter where a round multiplies: of the first three rounds' six
products, four are then the same for all keys.

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
    def dropped(self):
        """Of an element's 2**15 cases those that drop it."""
        return min(int(np.rint(np.float32(self.p) * np.float32(32768))), 32767)

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
        query_blocks, key_blocks = _blocks(queries, 16), _blocks(keys, 32)
        head = np.arange(heads.start, heads.stop, dtype=np.uint64)
        words = philox4x32(
            (head[:, None, None], np.arange(4 * key_blocks.start, 4 * key_blocks.stop, dtype=np.uint64),
             np.uint64(batch), np.arange(8 * query_blocks.start, 8 * query_blocks.stop, dtype=np.uint64)[:, None]),
            self.seed)
        rows, columns = len(query_blocks), len(key_blocks)
        bits = np.empty((len(head), rows, 2, 8, columns, 2, 2, 4), "<u4")
        for i, word in enumerate(words):
            word = word.reshape(len(head), rows, 8, columns, 4)
            bits[:, :, i % 2, :, :, 0, i // 2] = word
            bits[:, :, i % 2, :, :, 1, i // 2] = word >> np.uint64(8) | word << np.uint64(24) & np.uint64(_MASK)
        bits = bits.view("<u2").reshape(len(head), 16 * rows, 32 * columns)
        first_query, first_key = 16 * query_blocks.start, 32 * key_blocks.start
        bits = bits[:, queries.start - first_query:queries.stop - first_query,
                    keys.start - first_key:keys.stop - first_key] & 0x7FFF
        return bits >= self.dropped if self.dropped <= 16384 else bits < 32768 - self.dropped


def _blocks(rows, size):
    """The blocks of a size that hold some rows."""
    return range(rows.start // size, -(-rows.stop // size))
