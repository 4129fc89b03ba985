cimport cython
from libc.stdint cimport int64_t, uint64_t

from fa3._array cimport Border
from fa3._view cimport ArrayView

cdef struct Options:                  # the numbers of a call, their defaults settled; backends call them so too
    double softmax_scale
    bint causal
    int window_left                   # -1: unbounded
    int window_right                  # 0 if causal
    int attention_chunk
    double softcap
    int num_splits
    bint batch_invariant
    int pack_gqa                      # -1: chosen
    int sm_margin
    int fp8_accumulate                # 0: chosen; -1: all keys
    bint rotary_interleaved
    double dropout_p
    uint64_t dropout_seed             # 0 where an array on a GPU holds it


@cython.final
cdef class Problem:
    cdef readonly Border border
    cdef readonly bint on_gpu
    cdef readonly bint narrows        # q has 16 bits, k and v fp8: q is quantised before the backend sees it
    cdef tuple narrowed               # what holds q's codes and factors, then
    cdef object dtype                 # what dtype= says of q, k, v and their like
    cdef str k_name
    cdef str v_name
    cdef readonly ArrayView q
    cdef readonly ArrayView k
    cdef readonly ArrayView v
    # Further arrays, None where they were not given.
    cdef ArrayView cu_seqlens_q
    cdef ArrayView cu_seqlens_k
    cdef ArrayView cu_seqlens_k_new
    cdef ArrayView seqused_q
    cdef ArrayView seqused_k
    cdef ArrayView page_table
    cdef ArrayView cache_batch_idx
    cdef ArrayView cache_leftpad
    cdef ArrayView k_new
    cdef ArrayView v_new
    cdef ArrayView qv
    cdef ArrayView rotary_cos
    cdef ArrayView rotary_sin
    cdef ArrayView rotary_seqlens
    cdef ArrayView q_descale
    cdef ArrayView k_descale
    cdef ArrayView v_descale
    cdef ArrayView sinks
    cdef ArrayView dropout_seed       # one integer; on the CPU `options` have it too
    # Sizes.
    cdef readonly int64_t batch
    cdef readonly int64_t num_heads
    cdef readonly int64_t num_heads_kv
    cdef readonly int64_t head_dim
    cdef readonly int64_t head_dim_v
    cdef readonly int64_t max_seqlen_q
    cdef readonly int64_t max_seqlen_k
    cdef readonly int64_t cached
    cdef Options options

    cdef int begin(self, q, k, v, str k_name, str v_name, stream, dtype, bint written) except -1
    cpdef int dense_q(self) except -1
    cpdef int ragged_q(self, cu_seqlens_q, max_seqlen_q) except -1
    cpdef int dense_k(self, bint any_batch=*) except -1
    cpdef int ragged_k(self, max_seqlen_k) except -1
    cpdef int paged_k(self, page_table, max_seqlen_k=*) except -1
    cdef int cumulative_k(self, cu_seqlens_k) except -1
    cpdef int extend(self, qv=*, q_descale=*, k_descale=*, v_descale=*, sinks=*, seqused_q=*, seqused_k=*) except -1
    cdef int append(self, cu_seqlens_k_new, k, v) except -1
    cdef int use_cache(self, cache_seqlens, cache_batch_idx, cache_leftpad) except -1
    cdef int rotate(self, cos, sin, seqlens) except -1
    cdef int settle(self, softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, batch_invariant,
                    pack_gqa, sm_margin, fp8_accumulate=*) except -1
    cdef int drop(self, probability, seed) except -1
    cpdef int finish(self) except -1
    cdef dict arrays(self)
    cdef int out_shape(self, int64_t *shape) noexcept
    cdef int lse_shape(self, int64_t *shape) noexcept

    cdef str backend_dtype(self)
    cdef int size_kv(self, str first_axis, str second_axis) except -1
    cdef str batch_name(self)
    cdef ArrayView vector(self, array, str name, tuple allowed, int64_t size, str axes)
    cdef ArrayView one_integer(self, array, str name)
    cdef ArrayView per_sequence(self, array, str name)
    cdef ArrayView cumulative(self, array, str name)
    cdef ArrayView descale(self, array, str name)
    cdef ArrayView new_rows(self, array, str name, ArrayView cache, str cache_name, int64_t head_dim)
    cdef ArrayView rotary(self, array, str name)
