"""The public functions of the forward: each checks every argument, then has a backend fill the result."""

from fa3 import _dispatch
from fa3._documentation import documented


@documented()
def flash_attn_func(
    q, k, v, *,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, sinks=None,
    qv=None, q_descale=None, k_descale=None, v_descale=None, seqused_q=None, seqused_k=None,
    num_splits=0, batch_invariant=False, pack_gqa=None, sm_margin=0, fp8_accumulate=None, dropout_p=0.0,
    dropout_seed=None,
    return_lse=False, out=None, out_dtype=None, stream=None, dtype=None,
):
    """Exact attention of a batch of sequences: ``softmax(softmax_scale·q·kᵀ + mask)·v``.

    On a GPU of compute capability 9.0 this is the algorithm of FlashAttention-3 [1]_; CPU arrays are computed
    by NumPy. Query head i reads KV head ``i // (num_heads // num_heads_kv)``.

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim)
        float16, bfloat16 or float8_e4m3fn; on the CPU also float32 and float64. Of NumPy, PyTorch, CuPy, JAX,
        Numba, or anything that speaks DLPack or ``__cuda_array_interface__``.
    k : array (batch, seqlen_k, num_heads_kv, head_dim)
        Of q's dtype, and on its device; or float8_e4m3fn where q has 16 bits: q is then rounded to it, with a
        factor for each sequence and head, as `quantize_fp8` with granularity "batch_head" does, and the result
        has q's dtype. num_heads is a multiple of num_heads_kv.
    v : array (batch, seqlen_k, num_heads_kv, head_dim_v)
        Of k's dtype.
    {options}

    Returns
    -------
    {returns}

    Raises
    ------
    {raises}

    Notes
    -----
    *GPU.* head_dim and head_dim_v are multiples of 8 (fp8: 16) up to 256, with `qv` up to 64 and 512, and the
    last dimension is contiguous; the other strides are free, 0 and negative included. An array whose address or
    strides are not multiples of 16 bytes cannot be read by Hopper's tensor memory accelerator: a small kernel first
    copies it into workspace, once a call. A call only enqueues work on its stream. It never waits for the GPU and never
    reads device memory from the host; only CUDA itself may wait when a process launches a kernel for the first
    time and it is loaded, so warm up before capturing a graph.

    *Latent attention.* Rows of one cache hold the latent values and, behind them, the keys' rotary part. With `qv`
    these are ``v = cache[..., :512]`` and ``k = cache[..., 512:]``; absorbed, with head dims (576, 512), k is
    the cache itself, v the same as before, and q has in front what `qv` has else. The GPU computes both alike and
    reads the cache once; absorbed it needs v to be k's memory. Of fp8, q_descale and k_descale are then the
    factors of the whole score, its latent part too, and v_descale is that of the output alone. A model's own
    softmax_scale may be another than the default, which is of the dims that make the scores.

    *Nothing to see.* A query without a visible key has out 0 and lse -inf (or its sink). Empty arrays are no
    error.

    *NaN.* Values outside what a sequence may see never touch its result, even NaN or inf. NaN among what a
    query sees gives NaN in its row; on the GPU, NaN or inf in v may also reach queries of the same sequence
    that do not see it but share a block of keys with some that do. Rows past `seqused_q` belong to no query:
    there the result is not written.

    *fp8.* On the GPU probabilities are rounded to float8_e4m3fn relative to a row's maximum so far, scaled to
    make use of its range; their sum and lse are of the unrounded ones. A row that one key dominates may so be
    off by up to 1/17 of its size. Of fp8 products tensor cores keep 13 bits below the largest of what they add:
    scores, and lse with them, are off by up to 2**-11 of ``softmax_scale·Σ|q_i·k_i|``, and usually by a thirtieth
    of that.

    *Gradients.* Arrays that require gradients are read as they are; nothing is recorded.

    *Determinism.* Results are bitwise repeatable. ``FA3_CHECK=1`` in the environment turns on checks of
    values in GPU memory, which wait for the GPU.

    References
    ----------
    .. [1] J. Shah, G. Bikshandi, Y. Zhang, V. Thakkar, P. Ramani, T. Dao, "FlashAttention-3: Fast and
       Accurate Attention with Asynchrony and Low-precision", 2024.
    """
    return _dispatch.dense(
        q, k, v,
        softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
        qv, q_descale, k_descale, v_descale, seqused_q, seqused_k,
        num_splits, batch_invariant, pack_gqa, sm_margin, fp8_accumulate, dropout_p, dropout_seed,
        return_lse, out, out_dtype, stream, dtype)


@documented(lse="(num_heads, total_q)")
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *,
    page_table=None,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, sinks=None,
    qv=None, q_descale=None, k_descale=None, v_descale=None, seqused_q=None, seqused_k=None,
    num_splits=0, batch_invariant=False, pack_gqa=None, sm_margin=0, fp8_accumulate=None, dropout_p=0.0,
    dropout_seed=None,
    return_lse=False, out=None, out_dtype=None, stream=None, dtype=None,
):
    """Exact attention of sequences of any lengths, stored one after another.

    Sequence b has the query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` and likewise its keys.
    What `flash_attn_func` says of masks, heads, NaN, strides and determinism holds here for each sequence.

    Parameters
    ----------
    q : array (total_q, num_heads, head_dim)
        float16, bfloat16 or float8_e4m3fn; on the CPU also float32 and float64.
    k : array (total_k, num_heads_kv, head_dim)
        Of q's dtype, and on its device. With `page_table` pages (num_pages, page_size, num_heads_kv,
        head_dim).
    v : array (total_k, num_heads_kv, head_dim_v)
        As k.
    cu_seqlens_q, cu_seqlens_k : array (batch + 1,), int32
        Where each sequence begins; from 0 up, never falling. Rows past the last belong to no sequence, and
        their results are not written. With `page_table`, cu_seqlens_k only gives the lengths, and may be
        None: then seqused_k gives them, and without it all pages are full.
    max_seqlen_q, max_seqlen_k : int, optional
        The longest sequence's length, or more. Knowing it helps to choose tiles; it is never read from the
        GPU.
    {options}

    Returns
    -------
    {returns}

    Raises
    ------
    {raises}
    """
    return _dispatch.varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        page_table,
        softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
        qv, q_descale, k_descale, v_descale, seqused_q, seqused_k,
        num_splits, batch_invariant, pack_gqa, sm_margin, fp8_accumulate, dropout_p, dropout_seed,
        return_lse, out, out_dtype, stream, dtype)


@documented(lse="(batch, num_heads, seqlen_q), or (num_heads, total_q) with cu_seqlens_q")
def flash_attn_with_kvcache(
    q, k_cache, v_cache, *,
    k=None, v=None, rotary_cos=None, rotary_sin=None, rotary_interleaved=True, rotary_seqlens=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
    cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, scheduler_metadata=None,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, sinks=None,
    qv=None, q_descale=None, k_descale=None, v_descale=None, seqused_q=None,
    num_splits=0, batch_invariant=False, pack_gqa=None, sm_margin=0, fp8_accumulate=None,
    return_lse=False, out=None, out_dtype=None, stream=None, dtype=None,
):
    """Attention of new queries on a key-value cache, to which new keys may be appended first, in place.

    What `flash_attn_func` says of masks, heads, NaN, strides and determinism holds here too, with seqlen_k
    the length in use: `cache_seqlens` plus the new keys. What only device memory knows is not checked on the
    GPU: new keys that the cache has no room for are dropped, and a position past rotary_cos counts as its
    last; FA3_CHECK=1 raises.

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) with cu_seqlens_q
    k_cache : array (batch_cache, seqlen_cache, num_heads_kv, head_dim)
        With `page_table` pages (num_pages, page_size, num_heads_kv, head_dim). Written to when `k` is given.
        Without `cache_batch_idx`, batch_cache is q's batch.
    v_cache : array, k_cache's shape with head_dim_v
    k : array (batch, seqlen_k_new, num_heads_kv, head_dim), optional
        New keys, put into the cache from row cache_seqlens[b] on; (total_k_new, num_heads_kv, head_dim) with
        cu_seqlens_k_new. Needs `v` and `cache_seqlens`.
    v : array, k's shape with head_dim_v, optional
    rotary_cos, rotary_sin : array (seqlen_rotary, rotary_dim / 2), float32 or q's 16-bit dtype, optional
        Rotary position embedding of q and of the new keys. rotary_dim is a multiple of 16. New key i stands
        at cache_seqlens[b] + i; query i there too if the mask depends on positions (causal, window, chunk),
        else at cache_seqlens[b]. Both are turned in float32 (float64 arrays in float64) and then rounded to
        their dtype, the queries just as the keys in the cache; of fp8, what a turn takes past ±448 becomes
        ±448. Needs `k`.
    rotary_interleaved : bool, default True
        Rotate dimensions 2i and 2i + 1 (GPT-J's way); else i and i + rotary_dim/2 (GPT-NeoX's way).
    rotary_seqlens : array (batch,), int32, optional
        Positions to count from in place of cache_seqlens.
    cache_seqlens : int or array (batch,), int32, optional
        Rows of the cache in use, before the new keys. Default: all rows.
    cache_batch_idx : array (batch,), int32, optional
        The cache's batch entry of each sequence.
    cache_leftpad : array (batch,), int32, optional
        First rows of each sequence's cache to leave out; positions count from there. With it the GPU reads
        pages of any size as it reads those of no multiple of 8 rows: see `page_table`.
    cu_seqlens_q, cu_seqlens_k_new : array (batch + 1,), int32, optional
        Where each sequence's rows begin in a ragged q and in ragged new keys.
    max_seqlen_q : int, optional
        With cu_seqlens_q, the longest sequence's length, or more.
    scheduler_metadata : array (16,), int32, optional
        What `get_scheduler_metadata` gives. No call needs it.
    {options}

    Returns
    -------
    {returns}

    Raises
    ------
    {raises}
    """
    return _dispatch.kvcache(
        q, k_cache, v_cache,
        k, v, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens,
        cache_seqlens, cache_batch_idx, cache_leftpad, page_table,
        cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, scheduler_metadata,
        softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
        qv, q_descale, k_descale, v_descale, seqused_q,
        num_splits, batch_invariant, pack_gqa, sm_margin, fp8_accumulate,
        return_lse, out, out_dtype, stream, dtype)


def flash_attn_combine(out_partial, lse_partial, *, out=None, out_dtype=None):
    """Join the results of attention over disjoint parts of the keys: ``sum_i exp(lse_i - lse)·out_i``.

    With ``lse = log(sum_i exp(lse_i))`` this is attention over all the keys [1]_. A part whose lse is -inf
    saw nothing and is left out, whatever its out holds. Where all are left out, out is 0 and lse -inf. On the
    GPU this is one kernel on the current stream of out_partial's framework; strides are free, but for those of
    `out`, whose last dimension is contiguous there.

    Parameters
    ----------
    out_partial : array (splits, batch, seqlen_q, num_heads, head_dim_v), float32
    lse_partial : array (splits, batch, seqlen_q, num_heads), float32
        Natural logarithms.
    out : array (batch, seqlen_q, num_heads, head_dim_v), optional
        Where to write the result: float32, float16 or bfloat16.
    out_dtype : str or dtype, optional
        The result's dtype; default float32.

    Returns
    -------
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        In out_partial's framework, on its device.
    lse : array (batch, seqlen_q, num_heads), float32

    Raises
    ------
    TypeError, ValueError, BufferError, NotImplementedError, CudaError
        As `flash_attn_func`.

    References
    ----------
    .. [1] T. Dao, D. Haziza, F. Massa, G. Sizov, "Flash-Decoding for long-context inference", 2023.
    """
    return _dispatch.combine(out_partial, lse_partial, out, out_dtype)


def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, *,
    qkv_dtype="bfloat16", headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,
    page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False,
    num_splits=0, pack_gqa=None, sm_margin=0, stream=None,
):
    """An array for the ``scheduler_metadata`` of later calls, of which none needs it.

    FlashAttention-3 prepares a schedule once for all layers of a decoding step, by a kernel of its own. Here each
    thread block finds its work from the lengths in device memory as it goes, and the host chooses tiles and splits
    from shapes alone, within microseconds. So this launches nothing and reads nothing: code that was written for
    FlashAttention keeps working, and may reuse the array for as long as it likes, also in CUDA graphs. The names are
    FlashAttention-3's.

    Parameters
    ----------
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim : int
        The sizes of the calls to come. All but `batch_size` are of no account.
    cache_seqlens : array (batch_size,), int32
        Names the framework and the device.
    qkv_dtype, headdim_v, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new : optional
    causal, window_size, attention_chunk, has_softcap, num_splits, pack_gqa, sm_margin : optional
        Of no account; numbers are checked as in the calls to come.
    stream : int or stream object, optional
        CUDA stream that the array is made on. Default: the current stream of cache_seqlens' framework.

    Returns
    -------
    scheduler_metadata : array (16,), int32
        In cache_seqlens' framework, on its device. Its values mean nothing.

    Raises
    ------
    TypeError, ValueError, BufferError, CudaError
        As `flash_attn_func`.
    """
    return _dispatch.scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
        headdim_v, page_size, max_seqlen_k_new, causal, window_size, attention_chunk, has_softcap, num_splits,
        pack_gqa, sm_margin, stream)
