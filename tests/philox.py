"""Which probabilities dropout keeps, each element by itself: shares nothing with fa3.

All take Python's integers, or arrays of uint64.
"""

import numpy as np


def philox4x32_10(seed, c0, c1, c2, c3):
    """The four words of one call: ten rounds of two products, keys stepping between them."""
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second // 2**32 ^ c1 ^ k0, second % 2**32, first // 2**32 ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def fifteen_bits(seed, batch, head, query, key):
    """What decides about one element."""
    words = philox4x32_10(seed, head, 4 * (key // 32) + key % 8 // 2, batch, 8 * (query // 16) + query % 8)
    chosen = query // 8 % 2 + 2 * (key // 8 % 2)
    word = sum(words[i] * (chosen == i) for i in range(4))
    twice = word << 32 | word
    return twice >> 8 * (key // 16 % 2) + 16 * (key % 2) & 0x7FFF


def is_kept(p, bits):
    """What dropout of probability p makes of such bits."""
    dropped = min(round(float(np.float32(p)) * 32768), 32767)
    return bits >= dropped if dropped <= 16384 else bits < 32768 - dropped


def keep(p, seed, batch, num_heads, seqlen_q, seqlen_k):
    """Which elements of a sequence are kept: bool (num_heads, seqlen_q, seqlen_k)."""
    if p == 0:
        return np.ones((num_heads, seqlen_q, seqlen_k), bool)
    head, query, key = np.indices((num_heads, seqlen_q, seqlen_k), np.uint64)
    return is_kept(p, fifteen_bits(seed, np.uint64(batch), head, query, key))
