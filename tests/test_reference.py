"""What the reference takes for granted of Hopper's tensor cores, against a model of their sums."""

import ml_dtypes
import numpy as np
import pytest
import reference

STEP = 32  # products of e4m3 that are added at once


def sums_of_products(q, k):
    """q (sq, d) and k (sk, d) as tensor cores multiply e4m3: (sq, sk).

    The products of a step and the sum so far lose what lies below 2^-13 of the largest one's power of two.
    """
    total = np.zeros((len(q), len(k)))
    for first in range(0, q.shape[1], STEP):
        terms = q[:, None, first:first + STEP] * k[None, :, first:first + STEP]
        terms = np.concatenate([terms, total[..., None]], axis=-1)
        largest = np.abs(terms).max(axis=-1, keepdims=True)
        unit = np.exp2(np.floor(np.log2(np.where(largest == 0, 1, largest))) - 13)
        total = (np.trunc(terms / unit) * unit).sum(axis=-1)
    return total


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128, 256])
def test_scores_of_tensor_cores_are_within_their_bound(head_dim):
    rng = np.random.default_rng(head_dim)
    q, k = (rng.standard_normal((rows, 1, head_dim)).astype(ml_dtypes.float8_e4m3fn) for rows in (200, 100))
    scores = sums_of_products(q[:, 0].astype(float), k[:, 0].astype(float)) * 0.25
    for keys in (slice(7, 8), slice(None)):
        _, exact = reference.attention(q, k[keys], k[keys], scale=0.25)
        error = np.abs(np.log(np.exp(scores[:, keys]).sum(axis=1)) - exact[0])
        allowed = reference.fp8_score_error(q, k[keys], k[keys], scale=0.25)[:, 0, 0]
        assert (error <= allowed).all()
        assert (error > allowed / 100).any(), "the bound should not be far from what happens"
