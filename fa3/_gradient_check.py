"""A float64 check of gradients, written from the formula alone; of long sequences, a sample of rows.

It takes out and lse as the forward gave them, which `fa3._reference_check` has looked at: so the gradient of a key,
to which all queries give, costs no more than the rows it is summed from.
"""

from __future__ import annotations

import numpy as np

from ._reference_check import BLOCK_SCORES, WORK_BUDGET, Findings, Packed, Report, choose_rows, product, rows_in_use
from ._reference_dropout import COST, weights

# What fp32 sums may lose of the magnitudes that they add, which may cancel in a gradient.
_LOST_IN_SUMS, _LOST_IN_SINKS = 2.0**-20, 2.0**-16


def check_backward(gradients, dout, out, lse, q, k, v, packed: Packed, formula, *, budget=WORK_BUDGET, seed=0,
                   progress=None) -> Report:
    """Compare gradients with the formula in float64.

    Parameters
    ----------
    gradients : sequence of numpy.ndarray
        dq, dk, dv, and with sinks dsinks.
    dout, out, lse, q, k, v : numpy.ndarray
        What the backward was given: (total_q, h, dv) twice, (h, total_q), and the inputs in their own dtype.
    packed, formula, budget, progress
        As in `check_forward`.

    Returns
    -------
    Report
        Every row is searched for NaN and inf, and rows in no use for anything but 0.
    """
    dq, dk, dv, *dsinks = gradients
    in_use = {"dq": rows_in_use(packed.starts_q, packed.lens_q, len(q)),
              "dk": rows_in_use(packed.starts_k, packed.lens_k, len(k))}
    in_use["dv"] = in_use["dk"]
    total = int(packed.lens_q.sum()) * q.shape[1] + 2 * int(packed.lens_k.sum()) * k.shape[1]
    for name, got, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        reason = _at_a_glance(name, got, like, in_use[name])
        if reason:
            return Report(False, 0, total, np.nan, np.nan, None, reason)
    findings = Findings()
    rng = np.random.default_rng(seed)
    dropping = COST if formula.dropout_p else 0
    pair = q.shape[1] * (2 * q.shape[2] + 2 * v.shape[2] + dropping)
    chosen_q = choose_rows(packed, pair, budget // 2, rng)
    chosen_k = choose_rows(Packed(packed.starts_k, packed.lens_k, packed.starts_q, packed.lens_q), pair, budget // 2,
                           rng)
    parts = len(chosen_q) + len(chosen_k)
    for done, (b, rows) in enumerate(chosen_q, start=1):
        sequence = _Sequence(dout, out, lse, q, k, v, packed, b, formula)
        for block in _blocks(rows, sequence.group_size * sequence.seqlen_k):
            for kv_head in range(k.shape[1]):
                group = sequence.group(kv_head)
                exact, naive, slack = sequence.of_queries(block, kv_head)
                findings.add_rows(b, block, group, dq[packed.starts_q[b] + block, group], exact, naive,
                                  "dq of query", slack)
        if progress is not None:
            progress(done, parts)
    for done, (b, rows) in enumerate(chosen_k, start=len(chosen_q) + 1):
        sequence = _Sequence(dout, out, lse, q, k, v, packed, b, formula)
        for block in _blocks(rows, sequence.group_size * sequence.seqlen_q):
            index = packed.starts_k[b] + block
            for kv_head in range(k.shape[1]):
                head = slice(kv_head, kv_head + 1)
                for name, got, (exact, naive, slack) in zip(
                        ("dk", "dv"), (dk, dv), sequence.of_keys(block, kv_head), strict=True):
                    findings.add_rows(b, block, head, got[index, head], exact, naive, f"{name} of key", slack)
        if progress is not None:
            progress(done, parts)
    if dsinks and not findings.reason:
        findings.reason = _wrong_sink(dsinks[0], dout, out, lse, packed, formula)
    return findings.report(total)


def _at_a_glance(name, got, like, in_use):
    """What needs no formula: "" if it is right."""
    if got.shape != like.shape:
        return f"{name} has shape {got.shape}"
    finite = np.isfinite(got.astype(np.float32)).all(axis=-1)
    if not finite.all():
        row, head = np.argwhere(~finite)[0]
        return f"{name}: row {row} of head {head} is not finite"
    if got[~in_use].any():
        return f"{name}: row {np.flatnonzero(~in_use & got.any(axis=(1, 2)))[0]} is in no use, and not 0"
    return ""


def _blocks(rows, scores_per_row):
    return np.array_split(rows, min(len(rows), max(1, -(-len(rows) * scores_per_row // BLOCK_SCORES))))


def _wrong_sink(dsinks, dout, out, lse, packed, formula):
    """Which sink's gradient is off by how much: "" if none is."""
    rows = rows_in_use(packed.starts_q, packed.lens_q, len(dout))
    products = dout[rows].astype(np.float64) * out[rows].astype(np.float64)
    weight = np.exp(formula.sinks - lse.T[rows].astype(np.float64))
    exact = -(weight * products.sum(axis=-1)).sum(axis=0)
    error = np.abs(dsinks - exact)
    allowed = _LOST_IN_SINKS * (weight * np.abs(products).sum(axis=-1)).sum(axis=0)
    bad = ~(error <= allowed)
    if not bad.any():
        return ""
    head = int(np.argmax(bad))
    return f"dsinks of head {head}: error {error[head]:.2e}, allowed {allowed[head]:.2e}"


class _Sequence:
    """One sequence's arrays, and its gradients twice: in float64, and naively in the input dtype."""

    def __init__(self, dout, out, lse, q, k, v, packed, b, formula):
        self.seqlen_q, self.seqlen_k = int(packed.lens_q[b]), int(packed.lens_k[b])
        rows = slice(int(packed.starts_q[b]), int(packed.starts_q[b]) + self.seqlen_q)
        keys = slice(int(packed.starts_k[b]), int(packed.starts_k[b]) + self.seqlen_k)
        self.q, self.dout, self.k, self.v = q[rows], dout[rows], k[keys], v[keys]
        self.lse = np.where(lse[:, rows] == -np.inf, 0, lse[:, rows]).T.astype(np.float64)
        self.delta = (dout[rows].astype(np.float64) * out[rows].astype(np.float64)).sum(axis=-1)
        self.formula, self.b = formula, b
        self.group_size = q.shape[1] // k.shape[1]

    def group(self, kv_head):
        return slice(kv_head * self.group_size, (kv_head + 1) * self.group_size)

    def of_queries(self, rows, kv_head):
        """(dq, naively, slack) of some queries: (rows, group, dim), and (rows, group)."""
        keys = np.arange(self.seqlen_k)
        values = self.k[:, kv_head].astype(np.float64)
        scale = self.formula.scale
        exact, naive = (scale * product(self.scores(rows, keys, kv_head, rounded)[1], values)
                        for rounded in (_unrounded, self.rounded))
        size = product(self.magnitudes(rows, keys, kv_head), np.abs(values))
        return exact, self.rounded(naive), _LOST_IN_SUMS * abs(scale) * size.max(axis=-1, initial=0)

    def of_keys(self, keys, kv_head):
        """The same of dk and dv of some keys: (keys, 1, dim), and (keys, 1)."""
        rows, group, scale = np.arange(self.seqlen_q), self.group(kv_head), self.formula.scale
        q, dout = (array[:, group].astype(np.float64) for array in (self.q, self.dout))
        results = []
        for rounded in (_unrounded, self.rounded):
            kept, ds = self.scores(rows, keys, kv_head, rounded)
            results.append((rounded(scale * _joined(ds, q)), rounded(_joined(kept, dout))))
        slack = (abs(scale) * _joined(self.magnitudes(rows, keys, kv_head), np.abs(q)).max(axis=-1, initial=0),
                 _joined(kept, np.abs(dout)).max(axis=-1, initial=0))
        return [(exact, naive, _LOST_IN_SUMS * lost) for exact, naive, lost in zip(*results, slack, strict=True)]

    def scores(self, rows, keys, kv_head, rounded):
        """What is kept of P, and dS without the scale, each (rows, group, keys)."""
        p, dp, slope, drop = self.parts(rows, keys, kv_head, rounded)
        ds = rounded(p * (rounded(dp * drop) - self.delta[rows, self.group(kv_head), None]) * slope)
        return rounded(p * drop), ds

    def magnitudes(self, rows, keys, kv_head):
        """What dS would be if nothing cancelled."""
        p, dp, slope, drop = self.parts(rows, keys, kv_head, _unrounded)
        return p * (np.abs(dp) * drop + np.abs(self.delta[rows, self.group(kv_head), None])) * slope

    def parts(self, rows, keys, kv_head, rounded):
        """P, dout · v, the softcap's slope, and dropout's weights: (rows, group, keys), or 1."""
        formula, group = self.formula, self.group(kv_head)
        k, v = self.k[keys, kv_head].astype(np.float64), self.v[keys, kv_head].astype(np.float64)
        s = rounded(product(self.q[rows, group].astype(np.float64), k.T) * formula.scale)
        slope = 1.0
        if formula.softcap > 0:
            capped = np.tanh(s / formula.softcap)
            s, slope = rounded(formula.softcap * capped), 1 - capped**2
        first, end = formula.masking.key_range(rows, self.seqlen_q, self.seqlen_k)
        hidden = ((keys < first[:, None]) | (keys >= end[:, None]))[:, None]
        p = rounded(np.exp(np.where(hidden, -np.inf, s - self.lse[rows, group, None])))
        drop = 1.0
        if formula.dropout_p > 0:
            drop = weights(formula.dropout_p, formula.dropout_seed, self.b, rows, np.arange(group.start, group.stop),
                           keys)
        return p, rounded(product(self.dout[rows, group].astype(np.float64), v.T)), slope, drop

    def rounded(self, x):
        return x.astype(self.q.dtype).astype(np.float64)


def _unrounded(x):
    return x


def _joined(scores, rows):
    """(rows, group, keys) and (rows, group, dim): the sum over rows and group for each key, (keys, 1, dim)."""
    return np.tensordot(scores, rows, axes=((0, 1), (0, 1)))[:, None]
