"""What only a GPU shows of the backward: device arrays that lie, and batches of nothing in arrays of something."""

import pytest

import fa3

pytestmark = pytest.mark.gpu
ROWS, HEADS, HEADS_KV = 400, 4, 2
# Ends of three sequences in 400 rows. In the first, query tiles of two sequences are the same.
LIES = [(256, 400, 0, 256), (0, 300, 150, 400), (-5, 150, 2**31 - 1, 3), (2**31 - 1, -2**31, 0, 400),
        (0, 1000, 2000, 400), (100, 100, 100, 100), (390, 395, 399, 1000)]


def ints(torch, values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def guarded(torch, *shape):
    """Zeros to write to, among sevens: (view, all of it)."""
    buffer = torch.full((shape[0] + 20, *shape[1:]), 7.0, device="cuda").half()
    buffer[10:-10] = 0
    return buffer[10:-10], buffer


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", LIES, ids=str)
def test_lengths_that_lie_stay_inside_the_arrays(torch, lengths, head_dim, causal, deterministic):
    """Whatever it computes, it comes to an end."""
    torch.manual_seed(0)
    q, dout, out = (torch.randn(ROWS, HEADS, head_dim, device="cuda").half() for _ in range(3))
    k, v = (torch.randn(ROWS, HEADS_KV, head_dim, device="cuda").half() for _ in range(2))
    lse = torch.randn(HEADS, ROWS, device="cuda")
    grads, buffers = zip(*(guarded(torch, ROWS, x.shape[1], head_dim) for x in (q, k, v)), strict=True)
    for cu_q, cu_k in ((lengths, (0, 100, 200, 400)), ((0, 100, 200, 400), lengths), (lengths, lengths)):
        fa3.flash_attn_varlen_backward(dout, q, k, v, out, lse, ints(torch, cu_q), ints(torch, cu_k), ROWS, ROWS,
                                       causal=causal, deterministic=deterministic,
                                       **dict(zip(("dq", "dk", "dv"), grads, strict=True)))
        torch.cuda.synchronize()
        for buffer in buffers:
            assert (buffer[:10] == 7).all() and (buffer[-10:] == 7).all()


def test_no_sequences_in_arrays_of_rows(torch):
    """Rows that no sequence has get zeros, though there is none that could have them."""
    q, k = (torch.ones(5, heads, 64, device="cuda").half() for heads in (HEADS, HEADS_KV))
    grads, buffers = zip(*(guarded(torch, *x.shape) for x in (q, k, k)), strict=True)
    for grad in grads:
        grad.fill_(float("nan"))
    sinks = torch.zeros(HEADS, device="cuda")
    nothing = ints(torch, [0])
    *_, dsinks = fa3.flash_attn_varlen_backward(
        q, q, k, k, q, torch.zeros(HEADS, 5, device="cuda"), nothing, nothing, sinks=sinks,
        **dict(zip(("dq", "dk", "dv"), grads, strict=True)))
    torch.cuda.synchronize()
    assert all((grad == 0).all() for grad in (*grads, dsinks))
    assert all((buffer[:10] == 7).all() and (buffer[-10:] == 7).all() for buffer in buffers)
