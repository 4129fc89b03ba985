"""The server's day in float64: attention, rotary embedding and what a result may be off by, in NumPy or PyTorch.

Written from the formula; nothing comes from fa3. tests/reference.py says where the rules and their numbers come from.
"""

from reference import FP8_PROBABILITY_SCALES, FP8_SCORE_ERROR

LSE_ABSOLUTE, LSE_RELATIVE = 1e-3, 1e-5
SMALLEST = 2.0**-24  # more than a subnormal of bfloat16, as much as one of float16


def rotate(arrays, x, cos, sin, interleaved, dtype):
    """x (rows, heads, dim) turned in float32 and rounded to dtype; cos and sin (rows, rotary_dim / 2) are its rows'."""
    half = cos.shape[-1]
    x = arrays.cast(x, "float32")
    turned = arrays.cast(x, "float32") + 0.0  # a copy
    evens = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    odds = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned[..., evens] = x[..., evens] * cos - x[..., odds] * sin
    turned[..., odds] = x[..., odds] * cos + x[..., evens] * sin
    return arrays.cast(turned, dtype)


def shares(arrays, model, q, k, v, out, lse):
    """How much of what is allowed the errors of one sequence's out and lse are, at most: two scalars; 1 passes.

    q (queries, h, d), k (keys, hk, d), v, out (queries, h, dv) in their own dtypes, lse (h, queries).
    """
    xp = arrays.xp
    queries, heads, _ = q.shape
    keys, heads_kv, _ = k.shape
    group = heads // heads_kv
    position = arrays.arange(queries)[:, None] + (keys - queries)
    key = arrays.arange(keys)[None, :]
    sees = key <= position
    if model.window >= 0:
        sees = sees & (key >= position - model.window)
    if model.chunk:
        sees = sees & (key // model.chunk == position // model.chunk)

    q, k, v = (arrays.cast(x, "float64") for x in (q, k, v))
    if model.is_fp8:
        q, k, v = (x * arrays.put(model.descales[f"{name}_descale"])[:, None]
                   for x, name in ((q, "q"), (k, "k"), (v, "v")))
    q = q.reshape(queries, heads_kv, group, -1)
    products = xp.einsum("ihgd,jhd->hgij", q, k) * model.scale
    exact, exact_lse = attend(arrays, model, products, sees, v)
    naive = worst_naive(arrays, model, products, sees, v, exact)

    got = arrays.cast(out, "float64").reshape(queries, heads_kv, group, -1)
    error, naive_error = (largest(xp, xp.abs(x - exact)) for x in (got, naive))
    rounding = (arrays.epsilon(model.out_dtype) / 2 + 2.0**-20) * largest(xp, xp.abs(exact))
    naive_error = xp.maximum(naive_error, xp.quantile(naive_error, 0.9))
    share = error / (xp.maximum(2 * naive_error, rounding) + rounding + SMALLEST)

    lse = arrays.cast(lse, "float64").reshape(heads_kv, group, queries)
    allowed = LSE_ABSOLUTE + LSE_RELATIVE * xp.abs(exact_lse)
    if model.is_fp8:
        sums = xp.einsum("ihgd,jhd->hgij", xp.abs(q), xp.abs(k)) * model.scale
        allowed = allowed + FP8_SCORE_ERROR * largest(xp, xp.where(sees, sums, 0.0))
    return share.max(), (xp.abs(lse - exact_lse) / allowed).max()


def attend(arrays, model, s, sees, v):
    """out (queries, hk, group, dv) and lse (hk, group, queries) of scores (hk, group, queries, keys)."""
    p, lse, total = weights(arrays, model, s, sees)
    return arrays.xp.einsum("hgij,jhd->ihgd", p / total, v), lse


def weights(arrays, model, s, sees):
    """Exponentials relative to a row's largest, its lse, and their sum, sinks included. Every query sees a key."""
    xp = arrays.xp
    if model.softcap:
        s = model.softcap * xp.tanh(s / model.softcap)
    s = xp.where(sees, s, -float("inf"))
    top = largest(xp, s)[..., None]
    sinks = None
    if model.has_sinks:
        sinks = arrays.put(model.sinks).reshape(*s.shape[:2], 1, 1)
        top = xp.maximum(top, sinks)
    p = xp.exp(s - top)
    total = p.sum(-1)[..., None]
    if sinks is not None:
        total = total + xp.exp(sinks - top)
    return p, (top + xp.log(total))[..., 0], total


def worst_naive(arrays, model, products, sees, v, exact):
    """The formula as it comes out in the input dtype, each intermediate array rounded to it.

    Probabilities of fp8 are rounded at some place of an octave: of four places, each row has its worst.
    """
    xp, dtype = arrays.xp, model.dtype

    def rounded(x, dtype):
        return arrays.cast(arrays.cast(x, dtype), "float64")

    if not model.is_fp8:
        s = rounded(products, dtype)
        if model.softcap:
            s = rounded(model.softcap * xp.tanh(s / model.softcap), dtype)
        p, _, total = weights(arrays, model.without_softcap, s, sees)
        return rounded(xp.einsum("hgij,jhd->ihgd", rounded(p / total, dtype), v), dtype)
    p, _, total = weights(arrays, model, products, sees)
    worst = exact
    for scale in FP8_PROBABILITY_SCALES:
        out = xp.einsum("hgij,jhd->ihgd", rounded(p * scale, dtype) / (scale * total), v)
        out = rounded(out, model.out_dtype)
        worse = largest(xp, xp.abs(out - exact)) > largest(xp, xp.abs(worst - exact))
        worst = xp.where(worse[..., None], out, worst)
    return worst


def largest(xp, x):
    return xp.amax(x, axis=-1)
