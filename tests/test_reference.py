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


@pytest.mark.parametrize("head_dim", [1, 16, 80, 128, 256])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_float32_in_any_order_is_within_its_bound(head_dim, scale):
    """Sums made term by term, which no library does: the largest errors that there are."""
    rng = np.random.default_rng(head_dim)
    q, k, v = (rng.standard_normal((rows, 1, head_dim)).astype(np.float32) for rows in (100, 70, 70))
    exact, _ = reference.attention(q, k, v, scale=scale)
    allowed = 2 * np.abs(reference.naive(q, k, v, scale=scale) - exact)
    shares = []
    for _ in range(5):
        dims, keys = rng.permutation(head_dim), rng.permutation(70)
        products = q[:, :, dims] * k[keys, 0][:, dims]
        s = np.cumsum(products, axis=-1, dtype=np.float32)[..., -1]
        s *= np.float32(scale)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        out = np.cumsum(p[..., None] * v[keys, 0], axis=1, dtype=np.float32)[:, -1]
        out /= np.cumsum(p, axis=1, dtype=np.float32)[:, -1:]
        shares.append((np.abs(out - exact[:, 0]) / allowed[:, 0]).max())
    assert 1 / 100 < max(shares) < 1, "the bound should not be far from what happens"
