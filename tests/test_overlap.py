"""Results in memory of other arrays: refused where a byte is in common, and taken where they only interleave."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_errors import backward, dense, zeros

PACKED = {  # q, k, v and a fourth of one array, none of which has an element of another
    "of rows": lambda: np.moveaxis(zeros(2, 5, 4, 3, 16), 2, 0),
    "of heads": lambda: np.moveaxis(zeros(2, 5, 12, 16).reshape(2, 5, 3, 4, 16), 3, 0),
    "of one batch after another": lambda: np.moveaxis(zeros(2, 4, 5, 3, 16), 1, 0),
    "of columns": lambda: np.moveaxis(zeros(2, 5, 3, 64).reshape(2, 5, 3, 4, 16), 3, 0),
    "of elements": lambda: np.moveaxis(zeros(2, 5, 3, 16, 4), 4, 0),
    "backwards": lambda: np.moveaxis(zeros(2, 5, 4, 3, 16), 2, 0)[:, ::-1, ::-1, :, ::-1],
    "rows of heads": lambda: np.moveaxis(zeros(2, 3, 5, 4, 16), 3, 0).swapaxes(2, 3),
    "rows before batches": lambda: np.moveaxis(zeros(5, 2, 3, 4, 16), 3, 0).swapaxes(1, 2),
}


@pytest.mark.parametrize("layout", PACKED)
def test_results_between_the_rows_of_other_arrays(layout):
    q, k, v, out = PACKED[layout]()
    dense(q=q, k=k, v=v, out=out)
    fresh = PACKED[layout]()
    backward(dout=q, q=q, k=k, v=v, out=q, lse=zeros(2, 3, 5), dq=out, dk=fresh[0], dv=fresh[3])
    with pytest.raises(ValueError, match="dv: shares memory with dk"):
        backward(dout=q, q=q, k=k, v=v, out=q, lse=zeros(2, 3, 5), dk=fresh[0], dv=fresh[0][::-1, ::-1])


def as_heads(columns, dim):
    """(batch, rows, any, 8) of one array as (batch, rows, heads, dim)."""
    heads = columns.shape[2] * 8 // dim
    shape, strides = (*columns.shape[:2], heads, dim), (*columns.strides[:2], 4 * dim, 4)
    return np.lib.stride_tricks.as_strided(columns, shape, strides)


def test_keys_and_values_of_two_head_dims_in_one_array():
    kv = zeros(2, 7, 2, 24)
    backward(dk=kv[..., :16], dv=kv[..., 16:])
    rows = zeros(2, 7, 112).reshape(2, 7, 14, 8)  # of each row two heads of k, two of v, four of q
    k, v, q = as_heads(rows[:, :, :4], 16), as_heads(rows[:, :, 4:6], 8), as_heads(rows[:, :, 6:], 16)
    backward(dk=k, dv=v, dq=q[:, 2:])
    with pytest.raises(ValueError, match="dv: shares memory with dq"):
        backward(dk=k, dv=as_heads(rows[:, :, 5:7], 8), dq=q[:, 2:])


def test_what_takes_too_long_to_tell_apart_counts_as_shared():
    """Even strides, and an odd distance: nothing is shared, but there are too many ways to almost meet."""
    memory, shape = np.zeros(200000, np.float32), (40, 40, 40, 3)
    q = np.lib.stride_tricks.as_strided(memory[96001:], shape, [4 * n for n in (14, 22, 26, 34)])
    out = np.lib.stride_tricks.as_strided(memory, shape, [4 * n for n in (9600, 240, 6, 2)])
    with pytest.raises(ValueError, match="out: shares memory with q"):
        dense(q=q, k=zeros(40, 1, 1, 3), v=zeros(40, 1, 1, 3), out=out)


@given(st.data())
def test_memory_in_common_is_found_exactly(data):
    """Against NumPy, which solves the same equation; results that overlap themselves are refused before."""
    memory = np.zeros(400, np.float32)

    def part(shape):
        strides = [data.draw(st.integers(-9, 9) | st.sampled_from([0, 1, 2, 12, 24, 36, 72])) for _ in shape]
        lowest = sum(min(0, stride * (size - 1)) for stride, size in zip(strides, shape, strict=True))
        highest = sum(max(0, stride * (size - 1)) for stride, size in zip(strides, shape, strict=True))
        first = data.draw(st.integers(-lowest, max(-lowest, min(399 - highest, 60))))
        return np.lib.stride_tricks.as_strided(memory[first:], shape, [4 * stride for stride in strides])

    batch, rows, heads, dim = (data.draw(st.integers(1, 4)) for _ in range(4))
    q, out = part((batch, rows, heads, dim)), part((batch, rows, heads, dim))
    k = zeros(batch, 1, 1, dim)
    try:
        dense(q=q, k=k, v=k, out=out)
        message = ""
    except ValueError as error:
        message = str(error)
    assume("dimension" not in message and "overlap" not in message)
    assert message == ("out: shares memory with q, needs memory of its own" if np.shares_memory(q, out) else "")
