# cython: language_level=3, boundscheck=False, wraparound=False
"""One call's arrays, sizes and options: read off q, k, v, then what every further argument is checked against."""
from libc.limits cimport INT_MAX
from libc.math cimport pow
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from fa3 cimport _checks as check
from fa3._array cimport border_of
from fa3._dlpack cimport DL_CUDA
from fa3._view cimport ArrayView

import numbers

import numpy

from fa3 import _dtypes

cdef tuple GPU_DTYPES = _dtypes.GPU_DTYPES
cdef tuple CPU_DTYPES = _dtypes.CPU_DTYPES
cdef str FP8 = _dtypes.FP8
cdef tuple HALF = _dtypes.HALF
cdef tuple INT32 = ("int32",)
cdef tuple FLOAT32 = ("float32",)
cdef type NUMPY_NUMBER = numpy.generic  # an array's item, or 0-d arrays after arithmetic
cdef tuple SEEDS = ("int64", "uint64", "int32", "uint32")


cdef class Problem:
    """What the arrays of one call agree on, the views of all of them, and the numbers beside them.

    Parameters
    ----------
    q, k, v : array
    k_name, v_name : str
        What the caller calls the keys and values: ``k`` or ``k_cache``.
    stream : int or object, optional
    dtype : str or dtype object, optional
        What the bytes of q, k, v are, where their framework cannot say.
    written : bool
        k and v will be written, too.

    Attributes
    ----------
    q, k, v, cu_seqlens_q … : ArrayView
        Those after q, k and v are None where they were not given.
    batch, num_heads, num_heads_kv, head_dim, head_dim_v : int
    max_seqlen_q, max_seqlen_k : int
        Rows of the longest sequence, or an upper bound of them.
    cached : int
        On a GPU, rows of the cache in use before new keys, where the caller gave one number for all sequences.
    """

    def __init__(self, q, k, v, str k_name="k", str v_name="v", stream=None, dtype=None, bint written=False):
        self.begin(q, k, v, k_name, v_name, stream, dtype, written)

    cdef int begin(self, q, k, v, str k_name, str v_name, stream, dtype, bint written) except -1:
        """What ``__init__`` has to do; a call of the class costs more than this."""
        self.border = border_of(q, "q", stream, dtype)
        self.on_gpu = self.border.device_type == DL_CUDA
        self.dtype = dtype
        self.k_name, self.v_name = k_name, v_name
        self.q = self.border.view
        self.k = self.border.take(k, k_name, dtype, written)
        self.v = self.border.take(v, v_name, dtype, written)
        check.dtype(self.q, "q", GPU_DTYPES if self.on_gpu else CPU_DTYPES)
        self.narrows = self.k.dtype == FP8 and self.q.dtype in HALF
        if not self.narrows:
            check.same_dtype(self.k, k_name, self.q, "q")
        check.same_dtype(self.v, v_name, self.k if self.narrows else self.q, k_name if self.narrows else "q")
        return 0

    cdef str backend_dtype(self):
        """What q, k and v have when a backend gets them."""
        return FP8 if self.narrows else self.q.dtype

    # ---- q, k and v -------------------------------------------------------------------------------------

    cpdef int dense_q(self) except -1:
        """Read batch and rows off q (batch, seqlen_q, num_heads, head_dim)."""
        check.ndim(self.q, "q", 4, "(batch, seqlen_q, num_heads, head_dim)")
        self.batch = self.q.c_shape[0]
        self.max_seqlen_q = self.q.c_shape[1]
        self.num_heads = self.q.c_shape[2]
        self.head_dim = self.q.c_shape[3]
        return 0

    cpdef int ragged_q(self, cu_seqlens_q, max_seqlen_q) except -1:
        """Read batch and rows off q (total_q, num_heads, head_dim) and cu_seqlens_q (batch + 1,)."""
        cdef ArrayView ends
        check.ndim(self.q, "q", 3, "(total_q, num_heads, head_dim)")
        self.num_heads = self.q.c_shape[1]
        self.head_dim = self.q.c_shape[2]
        self.cu_seqlens_q = ends = self.border.take(cu_seqlens_q, "cu_seqlens_q")
        check.dtype(ends, "cu_seqlens_q", INT32)
        if ends.ndim != 1 or ends.c_shape[0] == 0:
            raise ValueError(f"cu_seqlens_q: shape {ends.shape}, needs (batch + 1,)")
        if self.on_gpu:
            check.contiguous_rows(ends, "cu_seqlens_q")
        self.batch = ends.c_shape[0] - 1
        self.max_seqlen_q = bound(max_seqlen_q, "max_seqlen_q", self.q.c_shape[0])
        return 0

    cpdef int dense_k(self, bint any_batch=False) except -1:
        """Read the keys' sizes off k (batch, seqlen_k, num_heads_kv, head_dim), a cache's of `any_batch`."""
        check.ndim(self.k, self.k_name, 4, "(batch, seqlen_k, num_heads_kv, head_dim)")
        self.size_kv("batch", "seqlen_k")
        if not any_batch and self.k.c_shape[0] != self.batch:
            hint = "; pages need a page_table, chosen entries a cache_batch_idx" if self.k_name == "k_cache" else ""
            raise ValueError(f"{self.k_name}: batch {self.k.c_shape[0]}, but {self.batch_name()} has {self.batch}"
                             + hint)
        self.max_seqlen_k = self.k.c_shape[1]
        return 0

    cpdef int ragged_k(self, max_seqlen_k) except -1:
        """Read the keys' sizes off k (total_k, num_heads_kv, head_dim)."""
        check.ndim(self.k, self.k_name, 3, "(total_k, num_heads_kv, head_dim)")
        self.size_kv("total_k", None)
        self.max_seqlen_k = bound(max_seqlen_k, "max_seqlen_k", self.k.c_shape[0])
        return 0

    cpdef int paged_k(self, page_table, max_seqlen_k=None) except -1:
        """Read the keys' sizes off pages (num_pages, page_size, num_heads_kv, head_dim) and their table."""
        cdef ArrayView pages
        cdef int64_t page_size
        check.ndim(self.k, self.k_name, 4, "(num_pages, page_size, num_heads_kv, head_dim)")
        self.size_kv("num_pages", "page_size")
        page_size = self.k.c_shape[1]
        if page_size < 1:
            raise ValueError(f"{self.k_name}: page_size 0, needs at least 1")
        self.page_table = pages = self.border.take(page_table, "page_table")
        check.dtype(pages, "page_table", INT32)
        check.ndim(pages, "page_table", 2, "(batch, max_pages)")
        check.same_size(pages.c_shape[0], "page_table", "batch", self.batch, self.batch_name())
        if self.on_gpu:
            check.contiguous_rows(pages, "page_table")
        self.max_seqlen_k = bound(max_seqlen_k, "max_seqlen_k", pages.c_shape[1] * page_size)
        return 0

    cdef int size_kv(self, str first_axis, str second_axis) except -1:
        """Check k and v against q and each other, in all but q's batch; a ragged k has no second axis of rows."""
        cdef ArrayView k = self.k, v = self.v
        cdef int heads = k.ndim - 2
        if v.ndim != k.ndim:
            row_axes = first_axis if second_axis is None else f"{first_axis}, {second_axis}"
            check.ndim(v, self.v_name, k.ndim, f"({row_axes}, num_heads_kv, head_dim_v)")
        check.same_size(k.c_shape[heads + 1], self.k_name, "head_dim", self.head_dim, "q")
        check.same_size(v.c_shape[0], self.v_name, first_axis, k.c_shape[0], self.k_name)
        if second_axis is not None:
            check.same_size(v.c_shape[1], self.v_name, second_axis, k.c_shape[1], self.k_name)
        check.same_size(v.c_shape[heads], self.v_name, "num_heads_kv", k.c_shape[heads], self.k_name)
        self.num_heads_kv = k.c_shape[heads]
        self.head_dim_v = v.c_shape[heads + 1]
        if self.head_dim < 1 or self.head_dim_v < 1:
            raise ValueError(f"{'q' if self.head_dim < 1 else self.v_name}: head_dim 0, needs at least 1")
        if self.num_heads_kv < 1 or self.num_heads % self.num_heads_kv:
            row_axes = first_axis if second_axis is None else f"{first_axis}, {second_axis}"
            raise ValueError(f"{self.k_name}: num_heads_kv {self.num_heads_kv}, needs a divisor of q's num_heads "
                             f"{self.num_heads}: ({row_axes}, num_heads_kv, head_dim)")
        return 0

    cdef str batch_name(self):
        """The argument that the batch was read off."""
        return "q" if self.cu_seqlens_q is None else "cu_seqlens_q"

    # ---- further arrays: each may be None ---------------------------------------------------------------

    cdef int cumulative_k(self, cu_seqlens_k) except -1:
        """Where the sequences of a ragged k begin."""
        self.cu_seqlens_k = self.cumulative(cu_seqlens_k, "cu_seqlens_k")
        return 0

    cpdef int extend(self, qv=None, q_descale=None, k_descale=None, v_descale=None, sinks=None, seqused_q=None,
                     seqused_k=None) except -1:
        """What every function of the forward takes."""
        cdef int64_t[check.MAX_NDIM] shape
        if qv is not None:
            self.qv = self.border.take(qv, "qv", self.dtype)
            check.same_dtype(self.qv, "qv", self.q, "q")
            check.shape(self.qv, "qv", self.out_shape(shape), shape, "q's shape with head_dim_v")
            if self.on_gpu:
                check.contiguous_rows(self.qv, "qv")
        self.q_descale = self.descale(q_descale, "q_descale")
        self.k_descale = self.descale(k_descale, "k_descale")
        self.v_descale = self.descale(v_descale, "v_descale")
        self.sinks = self.vector(sinks, "sinks", FLOAT32, self.num_heads, "(num_heads,)")
        self.seqused_q = self.per_sequence(seqused_q, "seqused_q")
        if self.narrows and (qv is not None or seqused_q is not None):  # rows out of use would count for q's factor
            raise NotImplementedError(f"{'qv' if qv is not None else 'seqused_q'}: given, needs None with q of dtype "
                                      f"{self.q.dtype} and {self.k_name} of {FP8}")
        if seqused_k is not None:  # with a cache, `use_cache` has set it
            self.seqused_k = self.per_sequence(seqused_k, "seqused_k")
        return 0

    cdef int append(self, cu_seqlens_k_new, k, v) except -1:
        """The keys and values to append to a cache, laid out as q is: with a batch axis, or ragged."""
        cdef int axis
        self.cu_seqlens_k_new = self.cumulative(cu_seqlens_k_new, "cu_seqlens_k_new")
        if k is None:
            return 0
        self.k_new = self.new_rows(k, "k", self.k, self.k_name, self.head_dim)
        self.v_new = self.new_rows(v, "v", self.v, self.v_name, self.head_dim_v)
        for axis in range(self.k_new.ndim - 1):
            if self.v_new.c_shape[axis] != self.k_new.c_shape[axis]:
                *rows, _ = k_shape = self.k_new.shape
                raise ValueError(f"v: shape {self.v_new.shape}, needs {(*rows, self.head_dim_v)}, as k's {k_shape}")
        check.no_overlap(self.k, self.k_name)
        check.no_overlap(self.v, self.v_name)
        return 0

    cdef int use_cache(self, cache_seqlens, cache_batch_idx, cache_leftpad) except -1:
        """How much of the cache is in use, once the new keys have been taken, and which parts of it."""
        cdef int64_t rows, room = self.max_seqlen_k
        if isinstance(cache_seqlens, numbers.Integral):
            rows = check.integer(cache_seqlens, "cache_seqlens", 0)
            if self.k_new is not None and self.k_new.ndim == 4:
                if self.k_new.c_shape[1] > room:
                    raise ValueError(f"k: seqlen_k_new {self.k_new.c_shape[1]}, needs at most {room}, the rows of "
                                     f"{self.k_name}")
                room -= self.k_new.c_shape[1]
            if rows > room:
                raise ValueError(f"cache_seqlens: {rows}, needs at most {room}, the rows of {self.k_name}"
                                 + (" less those of k" if self.k_new is not None else ""))
            if self.on_gpu:  # no array has to be made there
                self.cached = rows
                if self.k_new is None or check.empty(self.k_new):
                    self.max_seqlen_k = rows  # a shorter cache, the same for all
                cache_seqlens = None
            else:
                cache_seqlens = numpy.full(self.batch, rows, "int32")
        self.seqused_k = self.per_sequence(cache_seqlens, "cache_seqlens")
        self.cache_batch_idx = self.per_sequence(cache_batch_idx, "cache_batch_idx")
        self.cache_leftpad = self.per_sequence(cache_leftpad, "cache_leftpad")
        return 0

    cdef int rotate(self, cos, sin, seqlens) except -1:
        """The rotary embedding of q and of the new keys."""
        if cos is not None:
            self.rotary_cos = self.rotary(cos, "rotary_cos")
            self.rotary_sin = self.rotary(sin, "rotary_sin")
            check.same_dtype(self.rotary_sin, "rotary_sin", self.rotary_cos, "rotary_cos")
            check.shape(self.rotary_sin, "rotary_sin", 2, self.rotary_cos.c_shape, "as rotary_cos")
            if self.narrows:
                raise NotImplementedError(f"rotary_cos: given, needs None with q of dtype {self.q.dtype} and "
                                          f"{self.k_name} of {FP8}")
        self.rotary_seqlens = self.per_sequence(seqlens, "rotary_seqlens")
        return 0

    cdef ArrayView vector(self, array, str name, tuple allowed, int64_t size, str axes):
        """A view of an array (size,); `axes` names that."""
        cdef ArrayView view
        if array is None:
            return None
        view = self.border.take(array, name)
        check.dtype(view, name, allowed)
        check.shape(view, name, 1, &size, axes)
        if self.on_gpu:
            check.contiguous_rows(view, name)
        return view

    cdef ArrayView per_sequence(self, array, str name):
        """int32 (batch,)."""
        return self.vector(array, name, INT32, self.batch, "(batch,)")

    cdef ArrayView cumulative(self, array, str name):
        """int32 (batch + 1,)."""
        return self.vector(array, name, INT32, self.batch + 1, "(batch + 1,)")

    cdef ArrayView descale(self, array, str name):
        """fp32 of shape (), (num_heads_kv,) or (batch, num_heads_kv); q's also by num_heads."""
        cdef ArrayView view
        cdef bint fits
        if array is None:
            return None
        if type(array) is float or type(array) is int or isinstance(array, NUMPY_NUMBER):
            number = check.number(array, name)
            if self.on_gpu:  # to make an array there would be a copy, and no part of a graph
                raise TypeError(f"{name}: got {type(array).__name__}, needs an array on the GPU")
            array = numpy.array(number, "float32")
        view = self.border.take(array, name)
        if (self.q.dtype if name == "q_descale" else self.backend_dtype()) != FP8:
            raise ValueError(f"{name}: needs q of dtype {FP8}, but q has {self.q.dtype}")
        check.dtype(view, name, FLOAT32)
        heads = {self.num_heads_kv, self.num_heads} if name == "q_descale" else {self.num_heads_kv}
        fits = view.ndim == 0 or view.ndim <= 2 and view.c_shape[view.ndim - 1] in heads
        if not fits or view.ndim == 2 and view.c_shape[0] != self.batch:
            kinds = " or ".join([f"({head},) or ({self.batch}, {head})" for head in sorted(heads)])
            raise ValueError(f"{name}: shape {view.shape}, needs () or {kinds}: (num_heads,) or (batch, num_heads)")
        return view

    cdef ArrayView new_rows(self, array, str name, ArrayView cache, str cache_name, int64_t head_dim):
        """The keys or values to append."""
        cdef ArrayView view = self.border.take(array, name, self.dtype)
        check.same_dtype(view, name, cache, cache_name)
        if self.cu_seqlens_k_new is not None:
            check.ndim(view, name, 3, "(total_k_new, num_heads_kv, head_dim), with cu_seqlens_k_new")
        else:
            check.ndim(view, name, 4, "(batch, seqlen_k_new, num_heads_kv, head_dim)")
            check.same_size(view.c_shape[0], name, "batch", self.batch, "q")
        check.same_size(view.c_shape[view.ndim - 2], name, "num_heads_kv", self.num_heads_kv, self.k_name)
        check.same_size(view.c_shape[view.ndim - 1], name, "head_dim", head_dim, cache_name)
        if self.on_gpu:
            check.contiguous_rows(view, name)
        return view

    cdef ArrayView rotary(self, array, str name):
        """cos or sin: (seqlen_rotary, rotary_dim / 2)."""
        cdef ArrayView view = self.border.take(array, name)
        cdef int64_t rotary_dim
        if self.dtype is not None and view.dtype == "uint16":  # it may be float32 as well, which needs no dtype=
            view = self.border.take(array, name, self.dtype)
        check.dtype(view, name, (*FLOAT32, self.q.dtype) if self.q.dtype in HALF else FLOAT32)
        check.ndim(view, name, 2, "(seqlen_rotary, rotary_dim / 2)")
        rotary_dim = 2 * view.c_shape[1]
        if rotary_dim % 16 or not 0 < rotary_dim <= self.head_dim:
            raise ValueError(f"{name}: rotary_dim {rotary_dim}, needs a multiple of 16 from 16 to q's head_dim "
                             f"{self.head_dim}")
        if self.on_gpu and view.strides != (view.shape[1], 1) and not check.empty(view):
            raise ValueError(f"{name}: strides {view.strides}, needs {(view.shape[1], 1)} on the GPU: contiguous")
        return view

    # ---- numbers ----------------------------------------------------------------------------------------

    cdef int settle(self, softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, batch_invariant,
                    pack_gqa, sm_margin, fp8_accumulate=None) except -1:
        """Check the options that are numbers, and settle their defaults."""
        cdef Options *options = &self.options
        cdef int64_t depth = self.head_dim + (0 if self.qv is None else self.head_dim_v)
        if softmax_scale is None:
            options.softmax_scale = pow(depth, -0.5)
        else:
            options.softmax_scale = check.number(softmax_scale, "softmax_scale")
        options.causal = check.flag(causal, "causal")
        check.window(window_size, &options.window_left, &options.window_right)
        if options.causal:
            options.window_right = 0
        options.softcap = check.cap(softcap, "softcap")
        options.attention_chunk = check.chunk(attention_chunk)
        options.num_splits = <int>min(check.integer(num_splits, "num_splits", 0), max(self.max_seqlen_k, 1))
        options.batch_invariant = check.flag(batch_invariant, "batch_invariant")
        options.pack_gqa = -1 if pack_gqa is None else check.flag(pack_gqa, "pack_gqa")
        options.sm_margin = <int>check.integer(sm_margin, "sm_margin", 0)
        options.fp8_accumulate = 0
        if fp8_accumulate is not None:
            if self.backend_dtype() != FP8:
                raise ValueError(f"fp8_accumulate: {fp8_accumulate}, needs None with q of dtype {self.q.dtype}")
            keys = check.integer(fp8_accumulate, "fp8_accumulate", 0)
            options.fp8_accumulate = <int>min(keys, INT_MAX) if keys else -1
        options.rotary_interleaved = True
        return 0

    cdef int drop(self, probability, seed) except -1:
        """Dropout. A seed in an array is read now on the CPU; on a GPU a kernel will, so that graphs may change it."""
        cdef Options *options = &self.options
        options.dropout_p = check.probability(probability, "dropout_p")
        if seed is not None:
            number = check.seed(seed, "dropout_seed")
            if number is None:
                self.dropout_seed = self.one_integer(seed, "dropout_seed")
                if not self.on_gpu:
                    number = int(self.dropout_seed.numpy().reshape(-1)[0]) % 2**64
            if number is not None:
                options.dropout_seed = <uint64_t>number
        if options.dropout_p > 0 and seed is None:
            raise ValueError(f"dropout_seed: got None, but dropout_p is {options.dropout_p} and needs one: an int, "
                             "or an array that holds one")
        return 0

    cdef ArrayView one_integer(self, array, str name):
        """A view of an array with one integer of 32 or 64 bits, in no dimension or one."""
        cdef ArrayView view = self.border.take(array, name)
        check.dtype(view, name, SEEDS)
        if view.ndim > 1 or view.ndim == 1 and view.c_shape[0] != 1:
            raise ValueError(f"{name}: shape {view.shape}, needs () or (1,)")
        return view

    # ---- the whole --------------------------------------------------------------------------------------

    cpdef int finish(self) except -1:
        """The checks that need all arrays: what the GPU's kernels ask of head dims, strides and sizes."""
        if not self.on_gpu:
            return 0
        check.head_dims(self.head_dim, self.head_dim_v, self.backend_dtype(), self.qv is not None, self.v_name)
        check.contiguous_rows(self.q, "q")
        check.contiguous_rows(self.k, self.k_name)
        check.contiguous_rows(self.v, self.v_name)
        check.fits(self.batch, self.batch_name(), "batch")
        check.fits(self.num_heads, "q", "num_heads")
        check.fits(self.q.c_shape[self.q.ndim - 3], "q", "rows")
        check.fits(self.k.c_shape[self.k.ndim - 3], self.k_name, "rows")
        if self.page_table is not None:
            check.fits(self.k.c_shape[0], self.k_name, "pages")
            check.fits(self.page_table.c_shape[1], "page_table", "pages")
        return check.fits(self.max_seqlen_k, self.k_name, "rows")

    cdef dict arrays(self):
        """The further arrays that were given, by name, as NumPy's: for the CPU's backend."""
        views = (
            ("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k),
            ("cu_seqlens_k_new", self.cu_seqlens_k_new), ("seqused_q", self.seqused_q), ("seqused_k", self.seqused_k),
            ("page_table", self.page_table), ("cache_batch_idx", self.cache_batch_idx),
            ("cache_leftpad", self.cache_leftpad), ("k_new", self.k_new), ("v_new", self.v_new), ("qv", self.qv),
            ("rotary_cos", self.rotary_cos), ("rotary_sin", self.rotary_sin),
            ("rotary_seqlens", self.rotary_seqlens), ("q_descale", self.q_descale), ("k_descale", self.k_descale),
            ("v_descale", self.v_descale), ("sinks", self.sinks))
        return {name: view.numpy() for name, view in views if view is not None}

    cdef int out_shape(self, int64_t *shape) noexcept:
        """q's with head_dim_v; returns the number of dimensions."""
        memcpy(shape, self.q.c_shape, self.q.ndim * sizeof(int64_t))
        shape[self.q.ndim - 1] = self.head_dim_v
        return self.q.ndim

    cdef int lse_shape(self, int64_t *shape) noexcept:
        """(batch, num_heads, seqlen_q), or (num_heads, total_q); returns the number of dimensions."""
        cdef int axis = self.q.ndim - 3
        shape[0] = self.batch
        shape[axis] = self.num_heads
        shape[axis + 1] = self.q.c_shape[axis]
        return axis + 2


cdef int64_t bound(given, str name, int64_t rows) except -1:
    """The longest sequence as far as it is known: what the caller says, and never more than all the rows."""
    return rows if given is None else min(check.integer(given, name, 0), rows)
