"""Which probabilities dropout keeps, for the float64 check: each element by itself, sharing no code with the backends.

`fa3._philox` has the layout and its reasons.
"""

import numpy as np

# What one element costs, in multiply-adds of the check's products.
COST = 300


def weights(p, seed, b, queries, heads, keys):
    """What the probabilities of a sequence are multiplied by, 0 or 1 / (1 - p).

    Parameters
    ----------
    p : float
    seed, b : int
        The seed, and the number of the sequence.
    queries, heads, keys : array of int
        By their number.

    Returns
    -------
    numpy.ndarray
        (queries, heads, keys), float64.
    """
    query, head, key = (np.asarray(x, dtype=np.uint64) for x in (queries, heads, keys))
    query, head = query[:, None, None], head[None, :, None]
    words = _philox(seed, (head, key // 32 * 4 + key % 8 // 2, np.uint64(b), query // 16 * 8 + query % 8))
    word = np.where(key // 8 % 2, np.where(query // 8 % 2, words[3], words[2]),
                    np.where(query // 8 % 2, words[1], words[0]))
    word = np.where(key // 16 % 2, word // 256 + word % 256 * 2**24, word)
    fifteen = np.where(key % 2, word // 65536, word) % 32768
    dropped = min(int(np.round(np.float32(p) * 32768)), 32767)
    kept = fifteen >= dropped if dropped <= 16384 else fifteen < 32768 - dropped
    return kept / (1 - p)


def _philox(seed, counter):
    """Philox4x32-10 of arrays of uint64."""
    high, low = np.uint64(32), np.uint64(2**32 - 1)
    for step in range(10):
        key = [np.uint64((part + step * weyl) % 2**32)
               for part, weyl in ((seed % 2**32, 0x9E3779B9), (seed // 2**32, 0xBB67AE85))]
        products = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = ((products[1] >> high) ^ counter[1] ^ key[0], products[1] & low,
                   (products[0] >> high) ^ counter[3] ^ key[1], products[0] & low)
    return counter
