"""A tiny model that learns on the CPU backend: attention has to find, among key-value pairs, the value of a key."""

import numpy as np
import philox
import pytest
import reference_gradients

import fa3

NUM_SYMBOLS, WIDTH, HEADS, HEAD_DIM, BATCH = 8, 16, 2, 16, 16


class Model:
    """One layer: embeddings of keys and values, projections, attention of 2 query heads on 1, and a readout."""

    def __init__(self, attend, seed=0):
        rng = np.random.default_rng(seed)
        shapes = {"key": (NUM_SYMBOLS, WIDTH), "value": (NUM_SYMBOLS, WIDTH), "wq": (WIDTH, HEADS * HEAD_DIM),
                  "wk": (WIDTH, HEAD_DIM), "wv": (WIDTH, HEAD_DIM), "out": (HEADS * HEAD_DIM, NUM_SYMBOLS)}
        self.weights = {name: rng.standard_normal(shape) / np.sqrt(shape[0] if name in ("wq", "wk", "wv", "out") else 1)
                        for name, shape in shapes.items()}
        self.moments = {name: (np.zeros(shape), np.zeros(shape)) for name, shape in shapes.items()}
        self.attend, self.steps = attend, 0

    def loss(self, keys, values, asked, answers, seed):
        """The mean cross-entropy, and the gradient of every weight."""
        w, (batch, n) = self.weights, keys.shape
        x, asks = w["key"][keys] + w["value"][values], w["key"][asked]
        q = (asks @ w["wq"]).reshape(batch, n, HEADS, HEAD_DIM)
        k, v = ((x @ w[name])[:, :, None] for name in ("wk", "wv"))
        attended, back = self.attend(q, k, v, seed)
        seen = attended.reshape(batch, n, -1)
        logits = seen @ w["out"]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        right = np.arange(NUM_SYMBOLS) == answers[..., None]
        loss = -np.log(p[right]).mean()
        d_logits = (p - right) / right[..., 0].size
        dq, dk, dv = back((d_logits @ w["out"].T).reshape(attended.shape))
        dq, dk, dv = dq.reshape(batch, n, -1), dk[:, :, 0], dv[:, :, 0]
        dx = dk @ w["wk"].T + dv @ w["wv"].T
        g = {"out": np.einsum("bni,bnj->ij", seen, d_logits), "wq": np.einsum("bni,bnj->ij", asks, dq),
             "wk": np.einsum("bni,bnj->ij", x, dk), "wv": np.einsum("bni,bnj->ij", x, dv),
             "key": np.zeros_like(w["key"]), "value": np.zeros_like(w["value"])}
        np.add.at(g["key"], keys, dx)
        np.add.at(g["key"], asked, dq @ w["wq"].T)
        np.add.at(g["value"], values, dx)
        return loss, g

    def step(self, rng, rate=0.01):
        """One step of Adam on a fresh batch: the loss before it."""
        self.steps += 1
        keys = rng.permuted(np.tile(np.arange(NUM_SYMBOLS), (BATCH, 1)), axis=1)
        values = rng.integers(0, NUM_SYMBOLS, keys.shape)
        order = np.argsort(keys, axis=1)
        asked = rng.permuted(np.sort(keys, axis=1), axis=1)
        answers = np.take_along_axis(np.take_along_axis(values, order, 1), asked, 1)
        loss, gradients = self.loss(keys, values, asked, answers, self.steps)
        for name, gradient in gradients.items():
            first, second = self.moments[name]
            first += 0.1 * (gradient - first)
            second += 0.01 * (gradient**2 - second)
            scaled = first / (1 - 0.9**self.steps) / (np.sqrt(second / (1 - 0.99**self.steps)) + 1e-8)
            self.weights[name] -= rate * scaled
        return loss


def by_fa3(dtype, dropout_p):
    def attend(q, k, v, seed):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        options = dict(dropout_p=dropout_p, dropout_seed=seed)
        out, lse = fa3.flash_attn_func(q, k, v, return_lse=True, **options)

        def back(dout):
            # small gradients are scaled to keep their digits in fp16, as mixed-precision training does
            gradients = fa3.flash_attn_backward((dout * 1024).astype(dtype), q, k, v, out, lse, **options)
            return [gradient.astype(np.float64) / 1024 for gradient in gradients]
        return out.astype(np.float64), back
    return attend


def by_the_formula(dropout_p):
    def attend(q, k, v, seed):
        keeps = [philox.keep(dropout_p, seed, b, HEADS, q.shape[1], k.shape[1]) for b in range(len(q))]

        def sequences(dout):
            return [reference_gradients.evaluate(dout[b], q[b], k[b], v[b], scale=HEAD_DIM**-0.5, keep=keep,
                                                 p_drop=dropout_p) for b, keep in enumerate(keeps)]

        def back(dout):
            results = sequences(dout)
            return [np.stack([getattr(one, name) for one in results]) for name in ("dq", "dk", "dv")]
        return np.stack([one.out for one in sequences(np.zeros(q.shape))]), back
    return attend


def curve(attend, steps):
    model, rng = Model(attend), np.random.default_rng(1)
    return np.array([model.step(rng) for _ in range(steps)])


@pytest.mark.parametrize(("dtype", "dropout_p"), [("float32", 0.0), ("float16", 0.0), ("float16", 0.1)])
def test_a_model_learns_to_look_up(dtype, dropout_p):
    losses = curve(by_fa3(dtype, dropout_p), 100)
    first, middle, last = losses[:3].mean(), losses[35:45].mean(), losses[-20:].mean()
    assert first > 1.5  # guessing among 8 costs log(8), 2.1
    assert last < middle < 0.1
    assert last < (0.001 if dropout_p == 0 else 0.05)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_loss_curve_is_that_of_float64(dropout_p):
    """Forty steps with gradients by the formula, and by the library in fp32: errors do not build up."""
    exact = curve(by_the_formula(dropout_p), 40)
    losses = curve(by_fa3("float32", dropout_p), 40)
    np.testing.assert_allclose(losses, exact, rtol=1e-5)
    assert exact[-1] < 0.1 * exact[0]
