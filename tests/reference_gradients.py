"""Attention with dropout and its gradients in float64, written from the formula; nothing here comes from fa3.

`evaluate` takes one sequence, in float64 or as it comes out in the input dtype; `batch` runs it over a batch.
"""

from dataclasses import dataclass

import numpy as np
import philox
import reference

SMALLEST_NORMAL = 2.0**-126  # of fp32: a share of the softmax below it has fewer digits
# What a gradient may err by, relative to the magnitudes that it sums: 2^-20 for the fp32 in between, the forward's
# 64 roundings for fp32, and 2^-37 for fp64.
LOST_IN_SUMS = {2: 2.0**-20, 4: 2.0**-18, 8: 2.0**-37}


@dataclass
class Result:
    """One sequence's results; `slack_*` is what each row's gradient may err by beyond the forward's rule.

    A gradient may be the small difference of large terms, 0 where there is one key, and `out`, which is rounded
    before the backward begins, errs as any of its roundings: twice the root of their squares' sum is allowed, five
    standard deviations, of the hundred thousand rows of a test. Where one key has all the weight, its probability,
    rounded relative to a maximum that may be any, moves all of `out` at once, by a unit of rounding. The tanh of a
    capped score is rounded too, whose square the derivative has: a backward of 16 bits may take it from probabilities
    that are rounded to them.
    """

    out: np.ndarray  # (sq, h, dv)
    lse: np.ndarray  # (h, sq)
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dsinks: np.ndarray  # (h,)
    slack_dq: np.ndarray  # (sq, h)
    slack_dk: np.ndarray  # (sk, hk)
    slack_dv: np.ndarray
    slack_dsinks: np.ndarray  # (h,)


def evaluate(dout, q, k, v, *, scale, keep, p_drop=0.0, causal=False, window=(-1, -1), chunk=0, softcap=0.0,
             sinks=None, dlse=None, naive=False):
    """Results of one sequence.

    Parameters
    ----------
    dout, q, k, v : numpy.ndarray
        (sq, h, dv), (sq, h, d), (sk, hk, d), (sk, hk, dv).
    keep : numpy.ndarray of bool
        (h, sq, sk): what dropout leaves.
    dlse : numpy.ndarray, optional
        (h, sq).
    naive : bool
        Round every array in between to q's dtype; fp32 products are made in fp32.
    """
    seqlen_q, num_heads, _ = q.shape
    seqlen_k, num_heads_kv, _ = k.shape
    sees = reference.visible(seqlen_q, seqlen_k, causal, window, chunk)
    arithmetic = np.float32 if naive and q.dtype == np.float32 else np.float64

    def rounded(x):
        return x.astype(q.dtype).astype(arithmetic) if naive else x

    result = Result(
        np.zeros((seqlen_q, num_heads, v.shape[-1])), np.zeros((num_heads, seqlen_q)), np.zeros(q.shape),
        np.zeros(k.shape), np.zeros(v.shape), np.zeros(num_heads), np.zeros((seqlen_q, num_heads)),
        np.zeros((seqlen_k, num_heads_kv)), np.zeros((seqlen_k, num_heads_kv)), np.zeros(num_heads))
    with np.errstate(all="ignore"):
        for i in range(num_heads):
            j = i * num_heads_kv // num_heads
            queries, keys, values, given = (x.astype(arithmetic) for x in (q[:, i], k[:, j], v[:, j], dout[:, i]))
            s = rounded(queries @ keys.T * arithmetic(scale))
            slope, bend = 1.0, 0.0
            if softcap > 0:
                tanh = rounded(np.tanh(s / softcap))
                slope, bend = rounded(1 - tanh**2), 2 * abs(tanh)
                s = rounded(softcap * tanh)
            sink = -np.inf if sinks is None else float(sinks[i])
            p, lse = reference._softmax(np.where(sees, s.astype(np.float64), -np.inf), sink)
            p = rounded(np.where(sees, p, 0)).astype(arithmetic)
            kept = rounded(p * keep[i] / arithmetic(1 - p_drop))
            out = rounded(reference._weighted(kept, values, sees))
            dp = np.where(sees, rounded(rounded(given @ values.T) * keep[i] / arithmetic(1 - p_drop)), 0)
            delta = np.where(sees.any(axis=1), (given * out).sum(axis=1), 0)  # sum(p * dp), as plain code has it
            from_lse = np.zeros(seqlen_q) if dlse is None else dlse[i].astype(arithmetic)
            ds = np.where(sees, rounded(p * (dp - delta[:, None] + from_lse[:, None]) * slope), 0)
            result.out[:, i], result.lse[i] = out, lse
            result.dq[:, i] = reference._weighted(ds, keys, sees) * scale
            result.dk[:, j] += reference._weighted(ds.T, queries, sees.T) * scale
            result.dv[:, j] += reference._weighted(kept.T, given, sees.T)
            weight = np.zeros(seqlen_q) if sink == -np.inf else np.exp(sink - lse)
            result.dsinks[i] = (weight * (from_lse - delta)).sum()
            lost = np.full(seqlen_q, LOST_IN_SUMS[q.dtype.itemsize])
            if q.dtype.itemsize < 8:  # exp(s - lse): s is a sum in fp32, and lse is rounded to it
                summed = (abs(queries) @ abs(keys).T).max(axis=1, initial=0) * abs(scale)
                lost += 2.0**-22 * np.nan_to_num(summed + abs(lse), posinf=0)
            moved = abs(given) * (reference.UNIT_ROUNDOFF.get(q.dtype, 0.0) * abs(out)  # terms of D, by rounding out
                                  + reference.SMALLEST_SUBNORMAL[q.dtype])
            terms = abs(given) @ abs(values).T * keep[i] / (1 - p_drop) + abs(delta)[:, None] + abs(from_lse)[:, None]
            size = lost[:, None] * abs(p) * np.nan_to_num(terms)
            together = reference.UNIT_ROUNDOFF.get(q.dtype, 0.0) * abs(delta)
            shift = (2 * np.sqrt((moved**2).sum(axis=1)) + together)[:, None] * p * slope
            bent = 2 * reference.UNIT_ROUNDOFF.get(q.dtype, 0.0) * bend * p * np.nan_to_num(terms)
            result.slack_dq[:, i] = abs(scale) * (
                size @ abs(keys) + abs(shift @ keys) + np.sqrt(bent**2 @ keys**2)).max(axis=1, initial=0)
            result.slack_dk[:, j] += abs(scale) * (
                size.T @ abs(queries) + np.sqrt((shift**2 + bent**2).T @ queries**2)).max(axis=1, initial=0)
            result.slack_dv[:, j] += ((lost[:, None] * abs(kept)).T @ abs(given)).max(axis=1, initial=0)
            terms = abs(from_lse) + abs(given * out).sum(axis=1)
            least = SMALLEST_NORMAL * (abs(from_lse) + abs(given).sum(axis=1) * abs(values).max(initial=0))
            result.slack_dsinks[i] = (weight * (lost * terms + moved.sum(axis=1)) + least).sum()
    if naive:
        result.out, result.dq, result.dk, result.dv = (
            x.astype(q.dtype).astype(np.float64) for x in (result.out, result.dq, result.dk, result.dv))
    return result


def batch(dout, q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, dlse=None,
          p_drop=0.0, seed=0, **formula):
    """`evaluate` over a batch, dense or varlen: a Result of whole arrays, 0 where no sequence is."""
    num_heads, num_heads_kv = q.shape[-2], k.shape[-2]
    count = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    lse_shape = (count, num_heads, q.shape[1]) if cu_seqlens_q is None else (num_heads, len(q))
    whole = Result(
        np.zeros(dout.shape), np.zeros(lse_shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape),
        np.zeros(num_heads), np.zeros(q.shape[:-1]), np.zeros(k.shape[:-1]), np.zeros(k.shape[:-1]),
        np.zeros(num_heads))
    for b in range(count):
        rows, lse_rows = _rows(b, q, cu_seqlens_q, seqused_q)
        keys, _ = _rows(b, k, cu_seqlens_k, seqused_k)
        keep = philox.keep(p_drop, seed, b, num_heads, len(q[rows]), len(k[keys]))
        one = evaluate(dout[rows], q[rows], k[keys], v[keys], dlse=None if dlse is None else dlse[lse_rows], keep=keep,
                       p_drop=p_drop, **formula)
        whole.out[rows], whole.lse[lse_rows] = one.out, one.lse
        whole.dq[rows], whole.dk[keys], whole.dv[keys] = one.dq, one.dk, one.dv
        whole.slack_dq[rows], whole.slack_dk[keys], whole.slack_dv[keys] = one.slack_dq, one.slack_dk, one.slack_dv
        whole.dsinks += one.dsinks
        whole.slack_dsinks += one.slack_dsinks
    assert num_heads % num_heads_kv == 0
    return whole


def _rows(b, x, cu_seqlens, seqused):
    """Where the rows of sequence b are in x, and in lse."""
    if cu_seqlens is None:
        rows = slice(0, x.shape[1] if seqused is None else int(seqused[b]))
        return (b, rows), (b, slice(None), rows)
    first = int(cu_seqlens[b])
    rows = slice(first, int(cu_seqlens[b + 1]) if seqused is None else first + int(seqused[b]))
    return (rows,), (slice(None), rows)


def assert_gradients_close(dq, dk, dv, dsinks, exact, naive):
    """Fail unless each row of a gradient is as near to the reference as spec.md section 5 asks of the forward's.

    See `Result` for what is allowed besides. dsinks, fp32, is a sum over all rows, and allowed that alone.
    """
    for name, got in (("dq", dq), ("dk", dk), ("dv", dv)):
        try:
            reference.assert_close(got, getattr(exact, name), getattr(naive, name), got.dtype,
                                   slack=getattr(exact, f"slack_{name}"))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    if dsinks is None:
        return
    assert dsinks.dtype == np.float32
    allowed = exact.slack_dsinks + 2.0**-23 * abs(exact.dsinks) + 2.0**-149
    bad = ~(abs(dsinks - exact.dsinks) <= allowed)
    assert not bad.any(), f"dsinks: {dsinks[bad][0]}, reference {exact.dsinks[bad][0]}, allowed {allowed[bad][0]:.3e}"
