"""Attention in float64, written from the formula, and the rules by which results are compared with it.

Nothing here comes from fa3: a mask is a dense matrix, a batch is a loop over sequences and heads.
`attention` and `naive` take one sequence; `forward` runs either over a batch in any layout.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
# Half of the distance from 1 to the next number: what one rounding to the dtype costs, relatively.
UNIT_ROUNDOFF = {np.dtype(np.float16): 2.0**-11, BF16: 2.0**-8}
SMALLEST_SUBNORMAL = {np.dtype(np.float16): 2.0**-24, BF16: 2.0**-133, np.dtype(np.float32): 2.0**-149,
                      np.dtype(np.float64): 2.0**-1074}
# fp8 probabilities are multiplied by a number before they are rounded, so that small ones survive. A kernel that rounds
# relative to a maximum so far, or leaves a sink out of it, has a row's largest probability anywhere between two powers
# of two, where e4m3 loses nothing of it or up to 1/17. So the formula is tried at four places of that octave.
FP8_PROBABILITY_SCALES = tuple(256 * 2 ** (i / 4) for i in range(4))
# Of the sum of |q_i k_i|: what Hopper's tensor cores may lose of a score of e4m3. They align the 32 products of a step
# and the sum so far to the largest of them, and drop what lies below 2^-13 of it. Each loses less than that, half of it
# on average and towards zero, so signs cancel: on normal values of 16 to 256 dims the whole error has a standard
# deviation of 0.07 to 0.17 times 2^-13 of the sum, and the worst of 10^5 scores has 2.6 times (tests/test_reference.py
# has the model). Four times are allowed.
FP8_SCORE_ERROR = 2.0**-11


def visible(seqlen_q, seqlen_k, causal=False, window=(-1, -1), chunk=0):
    """Which key (column) each query (row) sees: a bool matrix (seqlen_q, seqlen_k)."""
    p = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    j = np.arange(seqlen_k)[None, :]
    sees = np.ones((seqlen_q, seqlen_k), dtype=bool)
    left, right = window
    if causal:
        sees &= j <= p
    elif right >= 0:
        sees &= j <= p + right
    if left >= 0:
        sees &= j >= p - left
    if chunk > 0:
        sees &= np.floor_divide(p, chunk) == np.floor_divide(j, chunk)
    return sees


def attention(q, k, v, *, scale=None, causal=False, window=(-1, -1), chunk=0, softcap=0.0, sinks=None, qv=None,
              q_descale=1.0, k_descale=1.0, v_descale=1.0):
    """Exact attention of one sequence in float64.

    Parameters
    ----------
    q, k, v, qv : numpy.ndarray
        (sq, h, d), (sk, hk, d), (sk, hk, dv) and (sq, h, dv), of any dtype.
    sinks : numpy.ndarray, optional
        (h,).
    q_descale, k_descale, v_descale : float or numpy.ndarray
        One number, or one per head, (h,) for q and (hk,) for k and v.

    Returns
    -------
    out : numpy.ndarray
        (sq, h, dv), float64.
    lse : numpy.ndarray
        (h, sq), float64.
    """
    return _evaluate(q, k, v, scale, causal, window, chunk, softcap, sinks, qv, q_descale, k_descale, v_descale,
                     _in_float64)


def naive(q, k, v, *, scale=None, causal=False, window=(-1, -1), chunk=0, softcap=0.0, sinks=None, qv=None,
          q_descale=1.0, k_descale=1.0, v_descale=1.0):
    """The same formula as it comes out in the input dtype: what `assert_close` measures errors against.

    Scores, capped scores, probabilities and the result are each rounded to q's dtype. For fp8 the scores stay in
    fp32, probabilities are scaled and rounded to e4m3 before they are normalised, and the result is bf16; of the
    scales that FP8_PROBABILITY_SCALES has, each row has that which is worst for it. In fp32 the result is off by what
    sums in any order may be, see `_float32_error`.
    """
    rounded = _in_fp8 if q.dtype == FP8 else _in_input_dtype
    return _evaluate(q, k, v, scale, causal, window, chunk, softcap, sinks, qv, q_descale, k_descale, v_descale,
                     rounded)[0]


def fp8_score_error(q, k, v, *, scale=None, causal=False, window=(-1, -1), chunk=0, softcap=0.0, sinks=None, qv=None,
                    q_descale=1.0, k_descale=1.0, v_descale=1.0):
    """What the tensor cores may lose of a score of e4m3, at most over the keys that a query sees: (sq, h, 1).

    lse is off by no more: it is the mean of its keys' errors, weighted by their probabilities.
    """
    seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, num_heads_kv, head_dim_v = v.shape
    factor_q, factor_k, factor_v = (np.abs(np.broadcast_to(factor, heads)) for factor, heads in (
        (q_descale, num_heads), (k_descale, num_heads_kv), (v_descale, num_heads_kv)))
    sees = visible(seqlen_q, seqlen_k, causal, window, chunk)
    lost = np.zeros((seqlen_q, num_heads, 1))
    for i in range(num_heads):
        j = i * num_heads_kv // num_heads
        sizes = _products_of_sizes(q[:, i], k[:, j]) * factor_k[j]
        if qv is not None:
            sizes += _products_of_sizes(qv[:, i], v[:, j]) * factor_v[j]
        lost[:, i, 0] = factor_q[i] * np.where(sees, sizes, 0).max(axis=1, initial=0)
    scale = (head_dim + (head_dim_v if qv is not None else 0)) ** -0.5 if scale is None else scale
    return FP8_SCORE_ERROR * abs(scale) * lost


def _products_of_sizes(a, b):
    return np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)).T


def _evaluate(q, k, v, scale, causal, window, chunk, softcap, sinks, qv, q_descale, k_descale, v_descale, head):
    seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, num_heads_kv, head_dim_v = v.shape
    if scale is None:
        scale = (head_dim + (head_dim_v if qv is not None else 0)) ** -0.5
    q_descale = np.broadcast_to(np.asarray(q_descale, dtype=np.float64), num_heads)
    k_descale = np.broadcast_to(np.asarray(k_descale, dtype=np.float64), num_heads_kv)
    v_descale = np.broadcast_to(np.asarray(v_descale, dtype=np.float64), num_heads_kv)
    sees = visible(seqlen_q, seqlen_k, causal, window, chunk)
    out = np.zeros((seqlen_q, num_heads, head_dim_v))
    lse = np.full((num_heads, seqlen_q), -np.inf)
    with np.errstate(all="ignore"):
        for i in range(num_heads):
            j = i * num_heads_kv // num_heads
            queries, keys, values = (x.astype(np.float64) for x in (q[:, i], k[:, j], v[:, j]))
            s = queries @ keys.T * (q_descale[i] * k_descale[j])
            if qv is not None:
                s = s + qv[:, i].astype(np.float64) @ values.T * (q_descale[i] * v_descale[j])
            sink = -np.inf if sinks is None else float(sinks[i])
            out[:, i], lse[i] = head(s * scale, values, sees, softcap, sink, q.dtype)
            if head is _in_input_dtype and q.dtype == np.float32:
                sizes = np.abs(queries) @ np.abs(keys).T * np.abs(q_descale[i] * k_descale[j])
                if qv is not None:
                    sizes += np.abs(qv[:, i]) @ np.abs(values).T * np.abs(q_descale[i] * v_descale[j])
                terms = head_dim + (head_dim_v if qv is not None else 0)
                out[:, i] += _float32_error(s * scale, sizes * abs(scale), terms, values, sees, softcap, sink) / 2
            out[:, i] *= v_descale[j]
    if head is not _in_float64:
        out = out.astype(BF16 if q.dtype == FP8 else q.dtype).astype(np.float64)
    return out, lse


def _in_float64(s, values, sees, softcap, sink, dtype):
    if softcap > 0:
        s = softcap * np.tanh(s / softcap)
    p, lse = _softmax(np.where(sees, s, -np.inf), sink)
    return _weighted(p, values, sees), lse


def _in_input_dtype(s, values, sees, softcap, sink, dtype):
    s = s.astype(dtype).astype(np.float64)
    if softcap > 0:
        s = (softcap * np.tanh(s / softcap)).astype(dtype).astype(np.float64)
    p, lse = _softmax(np.where(sees, s, -np.inf), sink)
    return _weighted(p.astype(dtype).astype(values.dtype), values, sees), lse


def _float32_error(s, sizes, terms, values, sees, softcap, sink):
    """What sums in fp32, in whatever order, may be off by: an array like out.

    A sum of n terms makes n roundings, each of at most u = 2^-24 of a partial sum, and so of `sizes`, the sum of the
    terms' sizes. As independent errors of mean 0 they come to a standard deviation of at most sqrt(n)/3 u: six of them
    are allowed, and 16 u for what happens to a score besides (scale, softcap, maximum, exponential). Scores off by d_j
    move a row by the sum of p_j d_j (v_j - out), which is at most max|d| times the values' standard deviation under p.
    """
    unit = 2.0**-24
    out, _ = _in_float64(s, values, sees, softcap, sink, None)
    squares, _ = _in_float64(s, values**2, sees, softcap, sink, None)
    magnitudes, _ = _in_float64(s, np.abs(values), sees, softcap, sink, None)
    deviation = np.sqrt(np.maximum(squares - out**2, 0))
    score = np.where(sees, sizes, 0).max(axis=1, initial=0)[:, None]
    return unit * ((2 * terms**0.5 + 16) * score * deviation + (2 * s.shape[1]**0.5 + 16) * magnitudes)


def _in_fp8(s, values, sees, softcap, sink, dtype):
    s = s.astype(np.float32).astype(np.float64)
    if softcap > 0:
        s = softcap * np.tanh(s / softcap)
    s = np.where(sees, s, -np.inf)
    largest = np.maximum(s.max(axis=1, initial=-np.inf), sink)[:, None]
    largest = np.where(largest == -np.inf, 0.0, largest)
    p = np.exp(s - largest)
    row_sum = p.sum(axis=1, keepdims=True) + np.exp(sink - largest)
    row_sum = np.where(row_sum == 0, 1.0, row_sum)
    exact = worst = _weighted(p / row_sum, values, sees)
    for scale in FP8_PROBABILITY_SCALES:
        out = _weighted((p * scale).astype(FP8).astype(np.float64) / (scale * row_sum), values, sees)
        worse = np.abs(out - exact).max(axis=1) > np.abs(worst - exact).max(axis=1)
        worst = np.where(worse[:, None], out, worst)
    return worst, None


def _softmax(s, sink):
    """Probabilities and lse of each row; a row without a visible key gives zeros and the sink's logit."""
    largest = np.maximum(s.max(axis=1, initial=-np.inf), sink)[:, None]
    largest = np.where(largest == -np.inf, 0.0, largest)
    p = np.exp(s - largest)
    row_sum = p.sum(axis=1, keepdims=True) + np.exp(sink - largest)
    lse = (largest + np.log(row_sum))[:, 0]
    return p / np.where(row_sum == 0, 1.0, row_sum), lse


def _weighted(p, values, sees):
    """Each row's sum of the values that it sees, and of no others: 0 * NaN is NaN."""
    if np.isfinite(values).all():
        return p @ values
    return np.stack([p[i, row] @ values[row] for i, row in enumerate(sees)]) if len(sees) else p @ values


@dataclass
class Result:
    """What `forward` gives. Rows in no sequence's use are 0 in `out` and `lse`, and False in `used`."""

    out: np.ndarray  # the shape of q, with v's last dimension; float64
    lse: np.ndarray  # (b, h, sq) or (h, total_q), float64
    used: np.ndarray  # (b, sq) or (total_q,), bool


def forward(q, k, v, *, evaluate=attention, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
            page_table=None, cache_batch_idx=None, cache_leftpad=None, qv=None, q_descale=None, k_descale=None,
            v_descale=None, **formula):
    """Run `attention`, `naive` or `fp8_score_error` over a batch: dense, varlen (cu_seqlens_*) or paged (page_table).

    Descales are (), (heads,) or (b, heads). Only `attention` gives an lse. The rest goes to `evaluate`.
    """
    num_heads = q.shape[-2]
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.zeros((batch, num_heads, q.shape[1]) if cu_seqlens_q is None else (num_heads, len(q)))
    used = np.zeros(q.shape[:-2], dtype=bool)
    for b in range(batch):
        if cu_seqlens_q is None:
            rows = (b, slice(0, q.shape[1] if seqused_q is None else seqused_q[b]))
            lse_rows = (b, slice(None), rows[1])
        else:
            length = cu_seqlens_q[b + 1] - cu_seqlens_q[b] if seqused_q is None else seqused_q[b]
            rows = (slice(cu_seqlens_q[b], cu_seqlens_q[b] + length),)
            lse_rows = (slice(None), rows[0])
        keys, values = (
            sequence_rows(x, b, cu_seqlens_k, seqused_k, page_table, cache_batch_idx, cache_leftpad) for x in (k, v)
        )
        result = evaluate(
            q[rows], keys, values, qv=None if qv is None else qv[rows],
            q_descale=_of_sequence(q_descale, b, num_heads), k_descale=_of_sequence(k_descale, b, k.shape[-2]),
            v_descale=_of_sequence(v_descale, b, k.shape[-2]), **formula,
        )
        if evaluate is attention:
            out[rows], lse[lse_rows] = result
        else:
            out[rows] = result
        used[rows] = True
    return Result(out, lse, used)


def sequence_rows(x, b, cu_seqlens=None, seqused=None, page_table=None, cache_batch_idx=None, cache_leftpad=None):
    """The rows of k or v that sequence b sees: (length, heads, dim)."""
    if page_table is not None:
        page_size = x.shape[1]
        if seqused is not None:
            length = seqused[b]
        elif cu_seqlens is not None:
            length = cu_seqlens[b + 1] - cu_seqlens[b]
        else:
            length = page_table.shape[1] * page_size
        rows = [x[page_table[b, j // page_size], j % page_size] for j in range(length)]
        rows = np.stack(rows) if rows else np.zeros((0, *x.shape[2:]), x.dtype)
    elif cu_seqlens is not None:
        rows = x[cu_seqlens[b]:cu_seqlens[b + 1]]
        rows = rows if seqused is None else rows[:seqused[b]]
    else:
        rows = x[b if cache_batch_idx is None else cache_batch_idx[b]]
        rows = rows if seqused is None else rows[:seqused[b]]
    return rows if cache_leftpad is None else rows[cache_leftpad[b]:]


def _of_sequence(descale, b, num_heads):
    if descale is None:
        return 1.0
    descale = np.asarray(descale, dtype=np.float64)
    descale = descale[b] if descale.ndim == 2 else descale
    # q's descale may come per KV head.
    return np.repeat(descale, num_heads // descale.size) if descale.ndim else float(descale)


def rotate(x, cos, sin, position, interleaved, arithmetic=np.float64):
    """Rotary embedding of x (rows, heads, dim), row i as at position[i], each operation rounded to `arithmetic`."""
    x = x.astype(arithmetic)
    half = cos.shape[-1]
    for row, at in enumerate(position):
        c, s = cos[at].astype(arithmetic), sin[at].astype(arithmetic)
        for pair in range(half):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
            first, second = x[row, :, a].copy(), x[row, :, b].copy()
            x[row, :, a] = first * c[pair] - second * s[pair]
            x[row, :, b] = second * c[pair] + first * s[pair]
    return x


def turned_queries(q, cos, sin, position, interleaved):
    """`rotate` as calls document it for queries: in float32, then rounded to q's dtype.

    Attention is compared on these. One rounding of an element of q moves a score by up to scale * |k| of it, which is
    more than lse is held to; given the same queries it is not.
    """
    return rotate(q, cos, sin, position, interleaved, np.float32).astype(q.dtype)


def assert_close(out, ref_out, naive_out, dtype, slack=0.0):
    """Fail unless each row is as near to the reference as spec.md section 5 asks.

    ``|out - ref| <= 2 * |naive - ref| + one rounding of dtype``, where a row is one query of one head and |x| is
    its largest element: single elements of `naive` are right by luck, the worst of a row hardly ever is. One
    rounding is half a unit in the last place of the row's largest element, and 2^-20 of it for the fp32 in
    between. Twice the naive error counts as no less than that rounding once more: a probability of exactly 1 or
    1/2 costs the naive formula nothing, but a kernel rounds it relative to its running maximum. And a row of few
    elements can be right by luck as a whole: it counts with no less than nine in ten rows have.
    In fp32 any order of the same operations is as good as the naive one: `naive` is off by half of what an order may
    add up to, |naive - ref| is the worst of the whole array, and 64 roundings are allowed; in fp64, where the
    reference is no better, 2^-37.
    Where the reference is NaN or infinite, so must `out` be, and nowhere else.

    Parameters
    ----------
    out, ref_out, naive_out : numpy.ndarray
        (…, dim), the last dimension being a row.
    dtype : dtype
        The output's type.
    slack : float or numpy.ndarray
        (…,): what is allowed besides.
    """
    dtype = np.dtype(dtype)
    out, ref_out, naive_out = (np.asarray(x).astype(np.float64) for x in (out, ref_out, naive_out))
    assert out.shape == ref_out.shape == naive_out.shape, (out.shape, ref_out.shape, naive_out.shape)
    if out.size == 0:
        return
    largest = float(ml_dtypes.finfo(dtype).max)
    finite = np.isfinite(ref_out) & (np.abs(ref_out) <= largest)
    wrong = np.isnan(out) != np.isnan(ref_out)
    wrong |= np.isinf(out) != (np.isinf(ref_out) | (np.abs(ref_out) > largest))
    assert not wrong.any(), (
        f"NaN or inf in the wrong place, first at {_first(wrong)}: {out[wrong][0]}, reference {ref_out[wrong][0]}"
    )
    ref = np.where(finite, ref_out, 0.0)
    error = np.abs(np.where(finite, out, 0.0) - ref).max(axis=-1)
    with np.errstate(invalid="ignore"):
        naive_error = np.where(finite & np.isfinite(naive_out), np.abs(naive_out - ref), 0.0).max(axis=-1)
    magnitude = np.abs(ref).max(axis=-1)
    if dtype.itemsize >= 4:
        naive_error, magnitude = naive_error.max(), magnitude.max()
        rounding = 2.0**-19 if dtype == np.float32 else 2.0**-38
    else:
        rounding = UNIT_ROUNDOFF[dtype] + 2.0**-20
        some = magnitude > 0  # rows that see nothing have no error, and say nothing of others
        if some.any():
            naive_error = np.maximum(naive_error, np.quantile(naive_error[some], 0.9))
    allowed = np.maximum(2 * naive_error, rounding * magnitude) + rounding * magnitude + SMALLEST_SUBNORMAL[dtype]
    allowed = np.broadcast_to(allowed + slack, error.shape)
    bad = ~(error <= allowed)
    if bad.any():
        worst = np.unravel_index(np.argmax(error / allowed), error.shape)
        raise AssertionError(f"{bad.sum()} of {bad.size} rows are off, the worst at {tuple(int(i) for i in worst)}: "
                             f"error {error[worst]:.3e}, allowed {allowed[worst]:.3e}")


def assert_lse_close(lse, ref_lse, dtype=np.float16, slack=0.0):
    """Fail unless lse is within 1e-3 (fp32, fp64: 1e-4) + 1e-5 * |ref| + slack, and infinite or NaN where ref is."""
    lse, ref_lse = np.asarray(lse).astype(np.float64), np.asarray(ref_lse).astype(np.float64)
    assert lse.shape == ref_lse.shape, (lse.shape, ref_lse.shape)
    absolute = 1e-3 if np.dtype(dtype).itemsize <= 2 else 1e-4
    special = ~np.isfinite(ref_lse)
    with np.errstate(invalid="ignore"):
        bad = ~(np.abs(lse - ref_lse) <= absolute + 1e-5 * np.abs(ref_lse) + slack)
    bad[special] = ~((lse == ref_lse) | (np.isnan(lse) & np.isnan(ref_lse)))[special]
    assert not bad.any(), (
        f"{bad.sum()} of {bad.size} lse are off, first at {_first(bad)}: {lse[bad][0]}, reference {ref_lse[bad][0]}"
    )


def _first(bad):
    return tuple(int(i) for i in np.argwhere(bad)[0])
