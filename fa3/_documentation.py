"""The options that several functions share, described once, and put into their docstrings at import."""

OPTIONS = {
    "page_table": """\
page_table : array (batch, max_pages), int32, optional
    Key j of sequence b is row ``j % page_size`` of page ``page_table[b, j // page_size]``. What it says of
    pages past a sequence's end does not matter. A page that does not exist is an error on the CPU; on the GPU
    its rows count as zeros, and FA3_CHECK=1 raises. On the GPU decoding in 16 bits from pages of a multiple
    of 8 rows takes up to 4% longer than from one piece, from others up to 11%, or 1.5 times as long where all
    sequences together have but a few thousand keys.""",
    "softmax_scale": """\
softmax_scale : float, optional
    Factor of q·kᵀ. Default: 1/sqrt(head_dim), or 1/sqrt(head_dim + head_dim_v) with `qv`.""",
    "causal": """\
causal : bool, default False
    Hide the keys after a query's position: its position is i + seqlen_k - seqlen_q (bottom-right
    alignment), so that the last query sees the last key. Sets the window's right side to 0.""",
    "window_size": """\
window_size : (int, int), default (-1, -1)
    Keys to see to the left and right of a query's position, both ends included; -1 is unbounded.""",
    "attention_chunk": """\
attention_chunk : int, default 0
    If c > 0, a query at position p sees only keys of its own chunk, floor(p/c)·c to floor(p/c)·c + c - 1.""",
    "softcap": """\
softcap : float, default 0.0
    If c > 0, scores s become c·tanh(s/c), after the scale and before the mask.""",
    "sinks": """\
sinks : array (num_heads,), float32, optional
    A logit for each query head that joins the softmax's denominator and the lse, and has no value.""",
    "qv": """\
qv : array, q's shape with head_dim_v, q's dtype, optional
    Scores become scale·(q·kᵀ + qv·vᵀ) (multi-head latent attention). On the GPU head_dim is then at most 64 and
    head_dim_v 512. Of fp8, q_descale counts for q and qv, v_descale for v in scores and output.""",
    "q_descale": """\
q_descale, k_descale, v_descale : array, float32, optional
    Factors of fp8 operands, q ≈ q_descale·q: one (shape ()), one for each KV head (num_heads_kv,), or for
    each sequence and KV head (batch, num_heads_kv); q_descale also by query head, (num_heads,) or
    (batch, num_heads). Any strides, 0 included. On the CPU a number is taken for shape ().""",
    "seqused_q": """\
seqused_q : array (batch,), int32, optional
    How many of each sequence's query rows are in use, from its first row on.""",
    "seqused_k": """\
seqused_k : array (batch,), int32, optional
    How many of each sequence's key rows are in use, from its first row on.""",
    "num_splits": """\
num_splits : int, default 0
    Parts that the keys are cut into, computed apart and combined, so that few queries keep a whole GPU busy.
    0: chosen, 1: none; more than there are blocks of keys, or with `batch_invariant` more than 1, are not
    made.""",
    "batch_invariant": """\
batch_invariant : bool, default False
    Make the bits of each sequence's result independent of what else is in the batch.""",
    "pack_gqa": """\
pack_gqa : bool, optional
    Put the query heads of one KV head into one tile. Default: chosen. Never changes more than rounding.""",
    "sm_margin": """\
sm_margin : int, default 0
    Multiprocessors to leave to others. Ignored on the CPU.""",
    "fp8_accumulate": """\
fp8_accumulate : int, optional
    Of fp8 on the GPU: after how many keys a sum of weighted values, of which tensor cores keep 13 bits below
    the largest of what they add, moves on to one in float32, rounded down to whole blocks of keys, but at least
    two blocks. 0: never; values whose mean is far from 0 then lose about 1/1000 for every 100 keys. Default:
    2,112; with head dims above 128 never up to 4,096 keys, unless with `batch_invariant`. There fewer than
    1,024 mean each block, but with `qv` two blocks at least. Measured every 2,048 keys it costs up to 2% of the
    time, 9% above head dim 128, and leaves such values an error of 2%; every 512 keys, 4 to 16% and 0.5%.""",
    "dropout_p": """\
dropout_p : float, default 0.0
    Drop each weight of the softmax with this probability, in steps of 2**-15, and multiply the others by
    ``1 / (1 - dropout_p)``; lse is that of all. Above 0 it needs a seed. On the GPU not of fp8, nor
    with `qv`.
dropout_seed : int or array () or (1,), optional
    Which weights are dropped: the same with the same seed, in forward and backward, on every device, by
    Philox4x32-10 of the seed at (batch, head, query, key). From 0 to 2**64 - 1, or an array of int64, uint64,
    int32 or uint32 on q's device (modulo 2**64), whose value may change between replays of a CUDA graph.""",
    "dlse": """\
dlse : array, lse's shape, float32, optional
    Gradient of lse, if what is optimised depends on it.""",
    "deterministic": """\
deterministic : bool, default False
    Make gradients bitwise repeatable. On the CPU they always are.""",
    "dq": """\
dq, dk, dv : array, optional
    Where to write the gradients: writable arrays of the shape, dtype and device of q, k, v, whose elements do
    not overlap each other or an input's. They are also returned.""",
    "return_lse": """\
return_lse : bool, default False
    Return ``(out, lse)`` in place of ``out``.""",
    "out": """\
out : array, optional
    Where to write the result: any writable array of the result's shape, dtype and device whose elements do
    not overlap each other or an input's; on the GPU its last dimension is contiguous. It is also returned.""",
    "out_dtype": """\
out_dtype : str or dtype, optional
    The result's dtype. Default: q's, or bfloat16 when q is fp8 (then float16 can be asked for).""",
    "stream": """\
stream : int or stream object, optional
    CUDA stream to work on: a handle, a CuPy or PyTorch stream, or anything with ``__cuda_stream__``.
    Default: the current stream of q's framework. Ignored on the CPU.""",
    "dtype": """\
dtype : str or dtype, optional
    What the bytes of q, k, v (and `qv`, new keys and values, `out`) are, where their framework has no such
    type:
    "float8_e4m3fn" for uint8, "bfloat16" for uint16. Where that is float8_e4m3fn, q may be float16 or bfloat16
    all the same.""",
}

SECTIONS = {
    "returns": """\
out : array
    In q's framework, on q's device, in C order (or `out`). An object that speaks only
    ``__cuda_array_interface__`` gets a CuPy array, and a framework without the dtype its bytes as unsigned
    ints.
lse : array, float32
    With `return_lse`: the natural logarithm of the sum of exponentials of the scaled, capped, masked scores,
    sinks included; {lse}.""",
    "gradients": """\
dq, dk, dv : array
    Of the shape and dtype of q, k, v, in q's framework and on its device (or `dq`, `dk`, `dv`).
dsinks : array (num_heads,), float32
    With `sinks` alone.""",
    "raises": """\
TypeError
    Something is not an array, or of the wrong dtype or type.
ValueError
    Shapes or values that do not fit: ``k: head_dim 96, but q has 128``.
BufferError
    An array on another device than q, or a read-only array that is to be written.
NotImplementedError
    Meaningful, but not built, and what; also a GPU that is not of compute capability 9.0.
CudaError
    CUDA failed; ``.code`` has its error code.""",
}


def documented(lse="(batch, num_heads, seqlen_q)"):
    """Decorator: fill a docstring's ``{options}`` (of its keywords), ``{returns}`` or ``{gradients}``, ``{raises}``."""
    def fill(function):
        text = function.__doc__
        if text is None:  # python -OO
            return function
        options = "\n".join(OPTIONS[name] for name in function.__kwdefaults__ if name in OPTIONS)
        for name, fragment in (("options", options), *SECTIONS.items()):
            head, mark, tail = text.partition("{" + name + "}")
            if mark:
                indent = head[head.rfind("\n") + 1:]  # none from Python 3.13 on, which strips docstrings
                text = head + fragment.replace("{lse}", lse).replace("\n", "\n" + indent) + tail
        function.__doc__ = text
        return function
    return fill
