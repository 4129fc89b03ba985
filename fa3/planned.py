"""Functions whose names and parameters are settled, not built yet: each raises NotImplementedError."""


def flash_attn_backward(
    dout, q, k, v, out, lse, *,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, sinks=None,
    dlse=None, seqused_q=None, seqused_k=None, sm_margin=0, deterministic=False, dropout_p=0.0,
    dropout_seed=None, dq=None, dk=None, dv=None, stream=None, dtype=None,
):
    """Gradients ``(dq, dk, dv)`` of `flash_attn_func`, and ``dsinks`` with `sinks`. Not built yet.

    Parameters
    ----------
    dout, out : array (batch, seqlen_q, num_heads, head_dim_v)
    q, k, v : array
        As in the forward call, whose options are given again.
    lse : array (batch, num_heads, seqlen_q), float32

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError("flash_attn_backward: the backward pass is not built yet")


def flash_attn_varlen_backward(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, sinks=None,
    dlse=None, seqused_q=None, seqused_k=None, sm_margin=0, deterministic=False, dropout_p=0.0,
    dropout_seed=None, dq=None, dk=None, dv=None, stream=None, dtype=None,
):
    """Gradients ``(dq, dk, dv)`` of `flash_attn_varlen_func`, and ``dsinks`` with `sinks`. Not built yet.

    Parameters
    ----------
    dout, out : array (total_q, num_heads, head_dim_v)
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As in the forward call, whose options are given again.
    lse : array (num_heads, total_q), float32

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError("flash_attn_varlen_backward: the backward pass is not built yet")


def get_scheduler_metadata(
    batch, max_seqlen_q, max_seqlen_k, num_heads, num_heads_kv, head_dim, cache_seqlens, *,
    head_dim_v=None, dtype="bfloat16", cu_seqlens_q=None, page_size=None, causal=False, window_size=(-1, -1),
    attention_chunk=0, num_splits=0, pack_gqa=None, sm_margin=0, stream=None,
):
    """The schedule of calls of one shape, an int32 array for their ``scheduler_metadata``. Not built yet.

    Parameters
    ----------
    batch, max_seqlen_q, max_seqlen_k, num_heads, num_heads_kv, head_dim : int
    cache_seqlens : array (batch,), int32

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError("get_scheduler_metadata: schedules made ahead are not built yet")
