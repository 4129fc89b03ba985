"""Functions whose names and parameters are settled, not built yet: each raises NotImplementedError."""


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
