"""The public functions of the backward: gradients from what the forward was given and gave."""

from fa3 import _dispatch
from fa3._documentation import documented


@documented()
def flash_attn_backward(
    dout, q, k, v, out, lse, *,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, sinks=None,
    dlse=None, seqused_q=None, seqused_k=None, sm_margin=0, deterministic=False, dropout_p=0.0,
    dropout_seed=None, dq=None, dk=None, dv=None, stream=None, dtype=None,
):
    """Gradients of `flash_attn_func`: what ``sum(dout·out)`` changes by with q, k, v and the sinks [1]_.

    The forward's options are given again, those that changed its result.

    Parameters
    ----------
    dout : array (batch, seqlen_q, num_heads, head_dim_v)
        Gradient of the result, of q's dtype.
    q : array (batch, seqlen_q, num_heads, head_dim)
        float16 or bfloat16; on the CPU also float32 and float64.
    k : array (batch, seqlen_k, num_heads_kv, head_dim)
    v : array (batch, seqlen_k, num_heads_kv, head_dim_v)
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        The forward's result.
    lse : array (batch, num_heads, seqlen_q), float32
        The forward's, with ``return_lse=True``. Both may be of more keys than k has, computed in parts and
        combined: the gradients of q by the parts then sum up.
    {options}

    Returns
    -------
    {gradients}

    Raises
    ------
    {raises}

    Notes
    -----
    *Sums.* dk and dv are summed in fp32 (float64: fp64) over the query heads that share a KV head, and rounded
    once.

    *Nothing to see.* A query without a visible key gives nothing and has dq 0, whatever its dout holds; a
    key that no query sees has dk and dv 0. Rows past `seqused_q` and `seqused_k` belong to no sequence: what
    they hold is not read, and their gradients are 0. Empty arrays are no error. With `sinks`, the lse of a
    query without a key is its sink, which `dlse` then goes to.

    *NaN.* Values outside what a sequence may see never touch its gradients, even NaN or inf.

    *float64.* lse is float32 there too; P is made to sum to 1 in float64 where rounding is all that parts it from
    that.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
    """
    return _dispatch.dense_backward(
        dout, q, k, v, out, lse,
        softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
        dlse, seqused_q, seqused_k, sm_margin, deterministic, dropout_p, dropout_seed,
        dq, dk, dv, stream, dtype)


@documented()
def flash_attn_varlen_backward(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, sinks=None,
    dlse=None, seqused_q=None, seqused_k=None, sm_margin=0, deterministic=False, dropout_p=0.0,
    dropout_seed=None, dq=None, dk=None, dv=None, stream=None, dtype=None,
):
    """Gradients of `flash_attn_varlen_func`, of sequences stored one after another.

    What `flash_attn_backward` says of sums, NaN and nothing to see holds here for each sequence.

    Parameters
    ----------
    dout : array (total_q, num_heads, head_dim_v)
        Gradient of the result, of q's dtype.
    q : array (total_q, num_heads, head_dim)
        float16 or bfloat16; on the CPU also float32 and float64.
    k : array (total_k, num_heads_kv, head_dim)
    v : array (total_k, num_heads_kv, head_dim_v)
    out : array (total_q, num_heads, head_dim_v)
        The forward's result.
    lse : array (num_heads, total_q), float32
        The forward's, with ``return_lse=True``.
    cu_seqlens_q, cu_seqlens_k : array (batch + 1,), int32
        Where each sequence begins. Rows past the last belong to no sequence: their gradients are 0.
    max_seqlen_q, max_seqlen_k : int, optional
        The longest sequence's length, or more.
    {options}

    Returns
    -------
    {gradients}

    Raises
    ------
    {raises}
    """
    return _dispatch.varlen_backward(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
        dlse, seqused_q, seqused_k, sm_margin, deterministic, dropout_p, dropout_seed,
        dq, dk, dv, stream, dtype)
