"""A float64 check of attention results, written from the formula alone.

It shares no code with the backends, so that one mistake cannot hide in both. ``fa3 run`` and the benchmark
use it; what is too large to recompute in a few seconds is checked on a sample of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._reference_dropout import COST, weights

# Multiply-adds that one check may spend on the float64 formula: a second or two on two cores.
WORK_BUDGET = 2**32
# Scores held at once, so that a long sequence is checked in bounded memory (8 MiB of float64).
BLOCK_SCORES = 2**20
_LSE_ABSOLUTE, _LSE_RELATIVE = 1e-3, 1e-5
# Of the sum of |q_i k_i|: tensor cores drop of each e4m3 product what lies below 2^-13 of the largest of a step, which
# comes to at most 2.6 times 2^-13 of the sum in 10^5 scores of normal values.
_FP8_SCORE_ERROR = 2.0**-11


@dataclass(frozen=True)
class Masking:
    """Which keys a query sees; positions are aligned at the bottom right."""

    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    attention_chunk: int = 0

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return not self.causal and self.window_left < 0 and self.window_right < 0 and self.attention_chunk <= 0

    def key_range(self, rows, seqlen_q: int, seqlen_k: int):
        """First visible key and one past the last, for each query index in `rows`."""
        position = np.asarray(rows, dtype=np.int64) + (seqlen_k - seqlen_q)
        first = np.zeros_like(position)
        end = np.full_like(position, seqlen_k)
        if self.window_left >= 0:
            first = np.maximum(first, position - self.window_left)
        right = 0 if self.causal else self.window_right
        if right >= 0:
            end = np.minimum(end, position + right + 1)
        if self.attention_chunk > 0:
            chunk_start = (position // self.attention_chunk) * self.attention_chunk
            first = np.maximum(first, chunk_start)
            end = np.minimum(end, chunk_start + self.attention_chunk)
        return first, np.maximum(first, end)

    def visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        """Number of (query, key) pairs that one head of one sequence computes."""
        if self.is_full:
            return seqlen_q * seqlen_k
        first, end = self.key_range(np.arange(seqlen_q), seqlen_q, seqlen_k)
        return int((end - first).sum())


@dataclass(frozen=True)
class Formula:
    """What turns q, k, v into out, apart from the arrays and their lengths."""

    scale: float
    masking: Masking = Masking()
    softcap: float = 0.0
    sinks: np.ndarray | None = None
    q_descale: np.ndarray | None = None  # (b, h)
    k_descale: np.ndarray | None = None  # (b, hk)
    v_descale: np.ndarray | None = None  # (b, hk)
    dropout_p: float = 0.0
    dropout_seed: int = 0


@dataclass(frozen=True)
class Packed:
    """Sequences one after another: row `starts_q[b] + i` is query i of sequence b, and `lens_*` are in use."""

    starts_q: np.ndarray
    lens_q: np.ndarray
    starts_k: np.ndarray
    lens_k: np.ndarray


@dataclass(frozen=True)
class Report:
    """What the check found. `share` is the largest error over what its row allows: at most 1 passes."""

    ok: bool
    rows_checked: int
    rows_total: int
    max_error: float
    share: float
    lse_error: float | None
    reason: str = ""

    def __str__(self) -> str:
        amount = "all" if self.rows_checked == self.rows_total else f"{self.rows_checked:,} of"
        text = f"{amount} {self.rows_total:,} rows, largest error {self.max_error:.2e}"
        if self.rows_checked:
            text += f" ({self.share:.2f} of what is allowed)"
        if self.lse_error is not None:
            text += f", lse {self.lse_error:.1e}"
        return f"ok: {text}" if self.ok else f"WRONG: {self.reason}; {text}"


def check_forward(out, lse, q, k, v, packed: Packed, formula: Formula, *, qv=None, budget=WORK_BUDGET, seed=0,
                  progress=None) -> Report:
    """Compare a forward result with the formula in float64.

    Parameters
    ----------
    out, lse : numpy.ndarray
        The result, (total_q, h, dv) and (h, total_q); `lse` may be None.
    q, k, v, qv : numpy.ndarray
        The inputs in their own dtype, (total_q, h, d), (total_k, hk, d), (total_k, hk, dv), (total_q, h, dv).
    packed : Packed
        Where each sequence lies and how long it is.
    formula : Formula
        Scale, mask, softcap, sinks and descales.
    budget : int
        Multiply-adds to spend; beyond it a random sample of rows is taken, with each chosen sequence's first and last.
    progress : callable, optional
        Called as ``progress(done, total)`` after each sequence.

    Returns
    -------
    Report
        Every row in use is searched for NaN and inf, whether it is in the sample or not.
    """
    heads, dim_v = q.shape[1], v.shape[-1]
    rows_total = int(packed.lens_q.sum()) * heads
    if out.shape != (*q.shape[:2], dim_v):
        return Report(False, 0, rows_total, np.nan, np.nan, None, f"out has shape {out.shape}")
    in_use = rows_in_use(packed.starts_q, packed.lens_q, out.shape[0])
    finite = np.isfinite(out.astype(np.float32)).all(axis=-1)
    if not finite[in_use].all():
        bad = np.argwhere(~finite & in_use[:, None])[0]
        return Report(False, 0, rows_total, np.nan, np.nan, None, f"row {bad[0]} of head {bad[1]} is not finite")

    cost = heads * (q.shape[2] + (dim_v if qv is None else 2 * dim_v) + (COST if formula.dropout_p else 0))
    chosen = choose_rows(packed, cost, budget, np.random.default_rng(seed))
    findings = Findings()
    for done, (b, rows) in enumerate(chosen, start=1):
        sequence = _Sequence(q, k, v, qv, packed, b, formula)
        blocks = min(len(rows), -(-len(rows) * sequence.scores_per_row // BLOCK_SCORES))
        for block in np.array_split(rows, blocks):
            index = packed.starts_q[b] + block
            for kv_head in range(k.shape[1]):
                group = sequence.group(kv_head)
                exact, naive, exact_lse, slack = sequence.rows(block, kv_head)
                findings.add_rows(b, block, group, out[index, group], exact, naive)
                if lse is not None:
                    findings.add_lse(b, lse[group, index].T, exact_lse, slack)
        if progress is not None:
            progress(done, len(chosen))
    return findings.report(rows_total)


class Findings:
    """The worst of what was compared so far."""

    def __init__(self):
        self.rows, self.max_error, self.share, self.lse_error = 0, 0.0, 0.0, None
        self.reason = ""

    def add_rows(self, b, rows, group, got, exact, naive, what="query", slack=None):
        """Compare one block of rows, (rows, group, dim), of sequence `b`.

        With `slack`, (rows, group), that is allowed besides, and no row's naive error counts less than nine in ten
        have: a gradient of few terms can be right by luck.
        """
        error = np.abs(got.astype(np.float64) - exact).max(axis=-1, initial=0.0)
        allowed = _allowed(exact, naive, got.dtype, slack)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(error > 0, error / allowed, 0.0)
        self.rows += error.size
        self.max_error = max(self.max_error, float(error.max()))
        if share.max() <= self.share:
            return
        self.share = float(share.max())
        row, head = np.unravel_index(int(share.argmax()), share.shape)
        if self.share > 1:
            self.reason = (f"{what} {rows[row]} of sequence {b}, head {group.start + head}: "
                           f"error {error[row, head]:.2e}, allowed {allowed[row, head]:.2e}")

    def add_lse(self, b, got, exact, slack):
        """Compare one block of lse, (rows, group), with `slack` allowed besides; infinities must agree."""
        got, slack = got.astype(np.float64), np.broadcast_to(slack, exact.shape)
        finite = np.isfinite(exact)
        if np.array_equal(got[~finite], exact[~finite]) and np.isfinite(got[finite]).all():
            error = np.abs(got[finite] - exact[finite])
            wrong = (error > _LSE_ABSOLUTE + _LSE_RELATIVE * np.abs(exact[finite]) + slack[finite]).any()
            worst = float(error.max(initial=0.0))
        else:
            worst, wrong = np.inf, True
        self.lse_error = max(self.lse_error or 0.0, worst)
        if wrong and not self.reason:
            self.reason = f"lse of sequence {b} is off by {worst:.2e}"

    def report(self, rows_total):
        return Report(not self.reason, self.rows, rows_total, self.max_error, self.share, self.lse_error, self.reason)


class _Sequence:
    """One sequence's arrays, and its formula evaluated twice: in float64, and naively in the input dtype."""

    def __init__(self, q, k, v, qv, packed, b, formula):
        self.seqlen_q, self.seqlen_k = int(packed.lens_q[b]), int(packed.lens_k[b])
        at_q, at_k = int(packed.starts_q[b]), int(packed.starts_k[b])
        self.q = q[at_q:at_q + self.seqlen_q]
        self.qv = None if qv is None else qv[at_q:at_q + self.seqlen_q]
        self.k = k[at_k:at_k + self.seqlen_k]
        self.v = v[at_k:at_k + self.seqlen_k]
        self.formula, self.b = formula, b
        self.group_size = q.shape[1] // k.shape[1]
        self.scores_per_row = self.group_size * max(self.seqlen_k, 1)
        self.is_fp8 = q.dtype.itemsize == 1

    def group(self, kv_head):
        return slice(kv_head * self.group_size, (kv_head + 1) * self.group_size)

    def rows(self, rows, kv_head):
        """(out in float64, out as the input dtype would compute it, lse, its slack), each (rows, group, …)."""
        first, end = self.formula.masking.key_range(rows, self.seqlen_q, self.seqlen_k)
        key = np.arange(self.seqlen_k)
        hidden = ((key < first[:, None]) | (key >= end[:, None]))[:, None, :]
        exact, lse = self._exact(rows, kv_head, hidden)
        slack = self._score_error(rows, kv_head, hidden) if self.is_fp8 else 0.0
        return exact, self._naive(rows, kv_head, hidden, exact), lse, slack

    def _score_error(self, rows, kv_head, hidden):
        """What tensor cores may lose of an fp8 score, at most over a query's keys: (rows, group)."""
        sums = 0.0
        for queries, keys, descale in self._factors(rows, kv_head):
            q, k = np.abs(queries.astype(np.float64)), np.abs(keys.astype(np.float64))
            sums = sums + product(q, k.T) * np.abs(descale)
        sums = np.where(hidden, 0.0, sums)
        return _FP8_SCORE_ERROR * abs(self.formula.scale) * sums.max(axis=-1, initial=0.0)

    def _factors(self, rows, kv_head):
        """The products that a score is summed from: (queries, keys, descale), with qv a second of qv and v."""
        group, formula = self.group(kv_head), self.formula
        factors = [(self.q[rows, group], self.k[:, kv_head], self._descale(kv_head, formula.k_descale))]
        if self.qv is not None:
            factors.append((self.qv[rows, group], self.v[:, kv_head], self._descale(kv_head, formula.v_descale)))
        return factors

    def _exact(self, rows, kv_head, hidden):
        formula, group = self.formula, self.group(kv_head)
        v = self.v[:, kv_head].astype(np.float64)
        s = sum(product(queries.astype(np.float64), keys.astype(np.float64).T) * (formula.scale * descale)
                for queries, keys, descale in self._factors(rows, kv_head))
        if formula.softcap > 0:
            s = formula.softcap * np.tanh(s / formula.softcap)
        s = np.where(hidden, -np.inf, s)
        p, lse = _softmax(s, self._sinks(group))
        out = product(p * self._dropout(rows, group), v)
        if formula.v_descale is not None:
            out *= float(formula.v_descale[self.b, kv_head])
        return out, lse

    def _naive(self, rows, kv_head, hidden, exact):
        """What plain code in the input dtype gives: every intermediate array is rounded to it."""
        import ml_dtypes

        formula, group = self.formula, self.group(kv_head)
        work = ml_dtypes.bfloat16 if self.is_fp8 else self.q.dtype

        def rounded(x, dtype=work):
            return x.astype(dtype).astype(np.float32)

        v = self.v[:, kv_head].astype(np.float32)
        scale = np.float32(formula.scale)
        s = rounded(sum(product(rounded(queries.astype(np.float32) * scale), keys.astype(np.float32).T)
                        * np.float32(descale) for queries, keys, descale in self._factors(rows, kv_head)))
        if formula.softcap > 0:
            s = rounded(np.float32(formula.softcap) * np.tanh(s / np.float32(formula.softcap)))
        p, _ = _softmax(np.where(hidden, np.float32(-np.inf), s), self._sinks(group))
        p = p * self._dropout(rows, group)
        descale = np.float32(1 if formula.v_descale is None else formula.v_descale[self.b, kv_head])
        if not self.is_fp8:
            return rounded(product(rounded(p), v) * descale).astype(np.float64)
        # Rounded relative to a maximum so far, a row's largest probability is anywhere between two powers of two, where
        # e4m3 loses nothing of it or up to 1/17: the worst of four places is what may be expected.
        largest = p.max(axis=-1, keepdims=True, initial=0)
        worst = exact
        for place in range(4):
            scale = np.float32(256 * 2 ** (place / 4)) / np.where(largest == 0, 1, largest)
            out = rounded(product(rounded(p * scale, ml_dtypes.float8_e4m3fn) / scale, v) * descale).astype(np.float64)
            worse = abs(out - exact).max(axis=-1) > abs(worst - exact).max(axis=-1)
            worst = np.where(worse[..., None], out, worst)
        return worst

    def _descale(self, kv_head, of_keys):
        """q_descale times that of keys, k_descale or v_descale: broadcastable over (rows, group, keys)."""
        product = np.ones((self.group_size, 1))
        if self.formula.q_descale is not None:
            product = product * self.formula.q_descale[self.b, self.group(kv_head), None]
        if of_keys is not None:
            product = product * of_keys[self.b, kv_head]
        return product

    def _dropout(self, rows, group):
        """What dropout multiplies the probabilities by: (rows, group, keys), or 1."""
        if self.formula.dropout_p == 0:
            return np.float32(1)
        return weights(self.formula.dropout_p, self.formula.dropout_seed, self.b, rows,
                       np.arange(group.start, group.stop), np.arange(self.seqlen_k))

    def _sinks(self, group):
        return None if self.formula.sinks is None else self.formula.sinks[group].astype(np.float64)


def product(left, right):
    """(rows, group, n) @ (n, m), as one product: NumPy would make one for every row."""
    rows, group, n = left.shape
    return (left.reshape(rows * group, n) @ right).reshape(rows, group, right.shape[-1])


def _softmax(s, sinks):
    """Probabilities and lse over the last axis; a row that sees nothing gets zeros and -inf, or its sink."""
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None].astype(s.dtype))
    shift = np.where(np.isfinite(top), top, 0).astype(s.dtype)
    p = np.exp(s - shift)
    total = p.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None].astype(s.dtype) - shift)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + shift)[..., 0]
    return p / np.where(total > 0, total, 1), lse


def _allowed(exact, naive, dtype, slack=None):
    """Twice the naive error of each row, plus one rounding of the output dtype; of gradients more, see `add_rows`."""
    import ml_dtypes

    eps = float(ml_dtypes.finfo(dtype).eps)
    naive_error = np.abs(naive - exact).max(axis=-1, initial=0.0)
    if slack is not None:
        naive_error = np.maximum(naive_error, np.quantile(naive_error, 0.9)) + slack / 2
    return 2 * naive_error + eps * np.abs(exact).max(axis=-1, initial=0.0)


def rows_in_use(starts, lens, total):
    """Which of `total` rows belong to a sequence."""
    in_use = np.zeros(total, dtype=bool)
    for start, length in zip(starts, lens, strict=True):
        in_use[start:start + length] = True
    return in_use


def choose_rows(packed, cost_per_pair, budget, rng):
    """[(sequence, query indices)]: all of them where `budget` allows it, else a sample with first and last."""
    lens_q, lens_k = packed.lens_q.astype(np.int64), packed.lens_k.astype(np.int64)
    sequences = np.flatnonzero(lens_q > 0)
    row_cost = np.maximum(lens_k, 1) * cost_per_pair
    total = int((lens_q * row_cost)[sequences].sum())
    if total <= budget:
        return [(int(b), np.arange(lens_q[b])) for b in sequences]
    if 2 * int(row_cost[sequences].sum()) > budget:
        count = max(2, int(len(sequences) * budget / (2 * int(row_cost[sequences].sum()))))
        drawn = rng.choice(sequences, size=min(count, len(sequences)), replace=False)
        sequences = np.unique(np.concatenate([sequences[[0, -1]], drawn]))
        total = int((lens_q * row_cost)[sequences].sum())
    share = budget / total
    chosen = []
    for b in sequences:
        drawn = rng.choice(lens_q[b], size=min(int(lens_q[b]), int(lens_q[b] * share)), replace=False)
        chosen.append((int(b), np.unique(np.concatenate([[0, lens_q[b] - 1], drawn]))))
    return chosen
