"""Quantisation to float8_e4m3fn on the CPU: the arithmetic of src/kernels/quantize.cu step by step, in fp32.

Both backends round at the same places, so that they give the same bits; a rotation by tensor cores adds up otherwise.
"""

from __future__ import annotations

import numpy as np

from fa3._dtypes import FP8, numpy_dtype
from fa3._numpy_cache import MAX_E4M3, cumulated, rounded

# So that a descale has an inverse, and norms over it are finite.
MIN_DESCALE = np.float32(2.0**-90)
# What is larger counts as infinite. With a rotation, sums of up to 1,024 inputs clipped to HUGE are finite, and one
# such input leaves its whole block above LIMIT.
LIMIT = np.finfo(np.float32).max
HUGE, ROTATED_LIMIT = np.float32(2.0**116), np.float32(2.0**111)
CHUNK = 1 << 18  # elements worked on at a time: 1 MiB in fp32, which stays in a core's cache

# The seed is the one of the first 20,000 whose signs, seen as a row, are spread best by the rotation themselves: so
# are rows that are constant or alternate, which random signs leave to chance.
_SEED = 738


def quantize(x, codes, descale, cu_seqlens, hadamard, cu_seqlens_name="cu_seqlens"):
    """Fill `codes` and `descale`.

    Parameters
    ----------
    x, codes : numpy.ndarray
        (batch, rows, heads, dim), or (rows, heads, dim).
    descale : numpy.ndarray, float32
        (), (heads,) or (batch, heads): as many values as there are scales.
    cu_seqlens : numpy.ndarray or None
        Where the sequences of a ragged x begin, for a descale (batch, heads).
    hadamard : bool
    cu_seqlens_name : str
        What the caller calls cu_seqlens.

    Raises
    ------
    ValueError
        Where cu_seqlens does not fit; nothing has been written then.
    """
    if cu_seqlens is not None:
        starts, lengths = cumulated(cu_seqlens_name, cu_seqlens, len(x))
        spans = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        sequences = [(x[span], codes[span]) for span in spans]
    elif x.ndim == 3:
        sequences = [(x, codes)]
    else:
        sequences = list(zip(x, codes, strict=True))
    rotation = Rotation(x.shape[-1]) if hadamard else None
    limit = ROTATED_LIMIT if hadamard else LIMIT
    with np.errstate(all="ignore"):  # NaN and inf are values like others here
        amax = np.zeros((len(sequences), x.shape[-2]), np.float32)
        for largest, (rows, _) in zip(amax, sequences, strict=True):
            for chunk in _chunks(rows):
                size = np.abs(rotation(rows[chunk])) * rotation.norms if hadamard else np.abs(_widened(rows[chunk]))
                np.maximum(largest, size.max(axis=(0, 2), initial=0, where=size <= limit), out=largest)
        descale[...] = _descale(amax.max(axis=tuple(range(2 - descale.ndim)), initial=0))
        of_sequence = np.broadcast_to(descale, amax.shape)
        for factor, (rows, target) in zip(of_sequence, sequences, strict=True):
            for chunk in _chunks(rows):
                if hadamard:
                    scaled = rotation(rows[chunk]) * (rotation.norms / factor[:, None])
                else:
                    scaled = _widened(rows[chunk]) * (1 / factor[:, None])
                target[chunk] = rounded(scaled, numpy_dtype(FP8))


def _descale(amax):
    return np.where(amax > 0, np.maximum(amax / MAX_E4M3, MIN_DESCALE), np.float32(1))


def _chunks(rows):
    """Slices of a (rows, heads, dim) array of about CHUNK elements each."""
    step = max(1, CHUNK // max(1, rows.shape[1] * rows.shape[2]))
    return [slice(first, first + step) for first in range(0, len(rows) if rows.size else 0, step)]


def _widened(rows):
    """A copy in fp32."""
    return np.array(rows, np.float32)


class Rotation:
    """The random-sign Hadamard rotation of a head dim: H·diag(signs), in blocks of the powers of two in head_dim.

    80 is 64 + 16: the first 64 dims are rotated among themselves, and the other 16. Sums are left as they are; `norms`
    has the factor of each dim that makes the rotation orthogonal, and is taken into the scale.
    """

    def __init__(self, head_dim):
        self.signs = signs(head_dim)
        self.blocks = []
        first = 0
        for size in (1 << bit for bit in reversed(range(head_dim.bit_length()))):
            if head_dim & size:
                self.blocks.append((first, size))
                first += size
        self.norms = np.array([size**-0.5 for _, size in self.blocks for _ in range(size)], np.float32)

    def __call__(self, rows):
        """A rotated copy in fp32 of rows (…, head_dim), without the norms."""
        rows = np.clip(np.asarray(rows, np.float32), -HUGE, HUGE) * self.signs
        for first, size in self.blocks:
            block = rows[..., first:first + size]
            step = 1
            while step < size:
                pairs = block.reshape(*block.shape[:-1], size // (2 * step), 2, step)
                low, high = pairs[..., 0, :], pairs[..., 1, :]
                block = np.stack([low + high, low - high], axis=-2).reshape(block.shape)
                step *= 2
            rows[..., first:first + size] = block
        return rows


def signs(head_dim):
    """The signs of the dims 0 … head_dim - 1, a hash of the dim: fixed for ever, the same on every device."""
    mixed = np.arange(_SEED, _SEED + head_dim, dtype=np.uint32) * np.uint32(0x9E3779B1)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    return np.where(mixed >> np.uint32(31), np.float32(-1), np.float32(1))
