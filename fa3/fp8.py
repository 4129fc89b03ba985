"""Quantisation to fp8, for attention's fp8 operands."""

from fa3 import _dispatch


def quantize_fp8(x, *, granularity="head", hadamard=False, cu_seqlens=None, stream=None, dtype=None):
    """Round an array to float8_e4m3fn: ``(x_e4m3, descale)`` with ``x ≈ x_e4m3·descale``.

    The scale comes from the largest magnitude (amax): ``descale = amax / 448``, so that amax becomes e4m3's largest
    number. The result goes straight into attention: x_e4m3 as q, k or v, and descale as q_descale, k_descale or
    v_descale.

    Parameters
    ----------
    x : array (batch, seqlen, num_heads, head_dim) or (total, num_heads, head_dim)
        float16, bfloat16 or float32, of any framework, with any strides; on the GPU the last dimension is
        contiguous, and head_dim a multiple of 8 up to 576.
    granularity : str, default "head"
        What shares a scale: "tensor", all of x; "head", each head of all sequences; "batch_head", each head of
        each sequence, the finest.
    hadamard : bool, default False
        Rotate the head dim first by an orthogonal matrix, the same for every row, head and device. Outliers are
        spread over the dims, and scales get smaller. Rotate q and k alike, and not v: q·kᵀ stays what it was,
        because the rotation cancels.
    cu_seqlens : array (batch + 1,), int32, optional
        Where each sequence of a ragged x begins. Needed for "batch_head" of a ragged x, and taken only there. Rows
        that it leaves out are not written.
    stream : int or stream object, optional
        CUDA stream to work on: a handle, a CuPy or PyTorch stream, or anything with ``__cuda_stream__``. Default:
        the current stream of x's framework. Ignored on the CPU.
    dtype : str or dtype, optional
        What the bytes of x are, where its framework has no such type: "bfloat16" for uint16.

    Returns
    -------
    x_e4m3 : array, float8_e4m3fn
        x's shape in x's framework, on x's device, in C order. A framework without the dtype gets the bytes as
        uint8; attention takes them with ``dtype="float8_e4m3fn"``.
    descale : array, float32
        () for "tensor", (num_heads,) for "head", (batch, num_heads) for "batch_head".

    Raises
    ------
    TypeError
        x is not an array, or of another dtype.
    ValueError
        Shapes or values that do not fit.
    BufferError
        cu_seqlens on another device than x.
    NotImplementedError
        A GPU that is not of compute capability 9.0.
    CudaError
        CUDA failed; ``.code`` has its error code.

    Notes
    -----
    *Rounding.* The codes are x·(1 / descale), the inverse and the product in fp32, rounded to nearest even. Both
    backends give the same bits; of a rotation in 16 bits tensor cores have an order of sums of their own, which may
    move descale by its last bit and a code to its neighbour. Where all is 0 (or nothing is there), descale is 1. It is
    never less than 2^-90.

    *NaN and infinity.* Neither counts for amax. NaN stays NaN, and infinity becomes ±448: nothing overflows to NaN.
    With `hadamard` an infinite value saturates the block that it is rotated with, and a NaN makes that block NaN;
    what is past 2^111 after the rotation counts as infinite. Where several infinities cancel, any number may come out.

    *The rotation* is H·diag(s)/sqrt(size), with H the Hadamard matrix in Sylvester's order (entries (-1)^popcount(i
    & j)) and s fixed signs. Where head_dim is no power of two, it is in blocks of the powers of two that head_dim is
    the sum of, largest first: 80 is 64 + 16. s of dim i is negative where this has its top bit set, in unsigned 32
    bits: ``m = (i + 738)·0x9E3779B1``, ``(m ^ m >> 16)·0x85EBCA6B``.

    *GPU.* One kernel launch. A share of x that fits on the chip is read once; of what does not fit, the second read
    comes mostly from the L2 cache. "tensor" needs all of x before the first code, so past about 50 MB some of it is
    read twice. The call never waits for the GPU and may be captured in a CUDA graph.

    *GQA.* With fewer KV heads than query heads, q's descale has one value for each query head.
    """
    return _dispatch.quantize(x, granularity, hadamard, cu_seqlens, stream, dtype)
