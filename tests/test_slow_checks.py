"""FA3_CHECK=1 (src/slow_checks.cpp) on a cache, without a GPU: what it refuses, and that it is what the CPU refuses."""

import ctypes

import forward_params
import numpy as np
import pytest
from compilers import HERE, SRC, host_library
from hypothesis import given
from hypothesis import strategies as st

from fa3._numpy_cache import find_sequences

OK, LENGTHS = 0, -6


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """The status and the sentence for a Call."""
    sources = [HERE / "host" / "slow_checks.cpp",
               *(SRC / f"{name}.cpp" for name in ("slow_checks", "prepare_plan", "status"))]
    library = host_library(tmp_path_factory.mktemp("host"), "slow_checks", sources,
                           f"-I{HERE / 'host' / 'host_memory'}")
    library.fa3_last_error.restype = ctypes.c_char_p
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FA3_CHECK", "1")
        yield lambda call: (library.check_slowly(ctypes.byref(call.params())), library.fa3_last_error().decode())


class Call:
    """Sequences in a cache, by the names that both backends have for what is known of them."""

    ROOM, PAGE_SIZE, POSITIONS = 16, 4, 24

    def __init__(self, cached, *, new=None, seqlen_q=1, used_q=None, causal=False, leftpad=None, rotary=False,
                 rotary_seqlens=None, pages=None, varlen_q=False):
        self.batch, self.new, self.seqlen_q, self.causal, self.rotary = len(cached), new, seqlen_q, causal, rotary
        integers = {"seqused_k": cached, "seqused_q": used_q, "cache_leftpad": leftpad,
                    "rotary_seqlens": rotary_seqlens, "page_table": pages,
                    "cu_seqlens_q": range(0, self.batch * seqlen_q + 1, seqlen_q) if varlen_q else None}
        self.integers = {name: None if values is None else np.array(values, np.int32)
                         for name, values in integers.items()}

    @property
    def num_pages(self):
        return 2 * self.batch * self.ROOM // self.PAGE_SIZE

    def params(self):
        of = {name: forward_params.address(values) for name, values in self.integers.items()}
        p = forward_params.Params(batch=self.batch)
        p.queries.rows = self.seqlen_q * (self.batch if of["cu_seqlens_q"] else 1)
        p.queries.cu_seqlens, p.queries.seqused = of["cu_seqlens_q"], of["seqused_q"]
        p.keys.rows, p.keys.seqused = self.ROOM, of["seqused_k"]
        p.mask = forward_params.Mask(self.causal, -1, -1, 0)
        cache = p.cache
        if self.new is not None:
            cache.k_new.data = cache.v_new.data = 4096
            cache.rows_new = self.new
        cache.cache_leftpad, cache.page_table = of["cache_leftpad"], of["page_table"]
        cache.page_size, cache.num_pages = self.PAGE_SIZE, self.num_pages
        cache.max_pages = cache.page_table_stride = self.ROOM // self.PAGE_SIZE
        if self.rotary:
            cache.rotary_cos = cache.rotary_sin = 4096
            cache.rotary_rows, cache.rotary_seqlens = self.POSITIONS, of["rotary_seqlens"]
        return p

    def on_the_cpu(self):
        """What the CPU's backend says of it, or nothing."""
        rows_q = (self.batch * self.seqlen_q,) if self.integers["cu_seqlens_q"] is not None else (
            self.batch, self.seqlen_q)
        paged = self.integers["page_table"] is not None
        cache = (self.num_pages, self.PAGE_SIZE) if paged else (self.batch, self.ROOM)
        try:
            find_sequences(
                np.zeros((*rows_q, 1, 8)), np.zeros((*cache, 1, 8)), batch=self.batch,
                max_seqlen_q=self.seqlen_q, max_seqlen_k=self.ROOM,
                k_new=None if self.new is None else np.zeros((self.batch, self.new, 1, 8)),
                cu_seqlens_k=None, cu_seqlens_k_new=None, cache_batch_idx=None,
                rotary_cos=np.zeros((self.POSITIONS, 8)) if self.rotary else None, rotate_each_query=self.causal,
                **self.integers)
        except ValueError as error:
            return str(error)
        return ""




@pytest.mark.parametrize(("call", "words"), [
    (Call([9], pages=[[0, 1, 2, -1]]), ""),
    (Call([9], pages=[[0, 1, 8, -1]]), "page_table: page 8 at [0, 2]"),
    (Call([9], pages=[[-1, 1, 2, -1]]), "page_table: page -1 at [0, 0]"),
    (Call([9], pages=[[-1, 1, 2, -1]], leftpad=[4]), ""),
    (Call([9], pages=[[-1, 1, 2, -1]], leftpad=[3]), "page_table: page -1 at [0, 0]"),
    (Call([9], pages=[[0, 99, 2, -1]], leftpad=[4]), "page_table: page 99 at [0, 1]"),
    (Call([9], pages=[[-1, -1, -1, -1]], leftpad=[9]), ""),
    (Call([9], pages=[[-1, -1, 2, 99]], leftpad=[9], new=4), "page_table: page 99 at [0, 3]"),
    (Call([9, 5], pages=[[0, 1, 2, -1], [-1, 1, -1, -1]], leftpad=[0, 5]), ""),
    (Call([9], leftpad=[10]), "cache_leftpad: 10 at 0, but it must be within 0 and 9"),
], ids=range(10))
def test_pages(check, call, words):
    """Those of the left padding are never read, and may be any."""
    status, sentence = check(call)
    assert (status != OK) == bool(words) == bool(call.on_the_cpu())
    assert sentence.startswith(words) or status == OK


@pytest.mark.parametrize(("call", "words"), [
    (Call([14], seqlen_q=10, causal=True, rotary=True), ""),
    (Call([14], seqlen_q=11, causal=True, rotary=True), "rotary_cos: 24 positions, but sequence 0 needs 25"),
    (Call([14], seqlen_q=11, rotary=True), ""),
    (Call([3], seqlen_q=1, rotary=True, rotary_seqlens=[23]), ""),
    (Call([3], seqlen_q=1, rotary=True, rotary_seqlens=[24]), "rotary_cos: 24 positions, but sequence 0 needs 25"),
    (Call([3], seqlen_q=1, rotary=True, rotary_seqlens=[-1]), "rotary_seqlens: -1 at 0"),
    (Call([3], seqlen_q=1, used_q=[0], rotary=True, rotary_seqlens=[99]), ""),
    (Call([3, 4], seqlen_q=9, used_q=[9, 2], causal=True, rotary=True, rotary_seqlens=[15, 22]), ""),
    (Call([3, 4], seqlen_q=9, used_q=[9, 3], causal=True, rotary=True, rotary_seqlens=[15, 22]),
     "rotary_cos: 24 positions, but sequence 1 needs 25"),
    (Call([3], new=5, rotary=True, rotary_seqlens=[19]), ""),
    (Call([3], new=5, rotary=True, rotary_seqlens=[20]), "rotary_cos: 24 positions, but sequence 0 needs 25"),
], ids=range(11))
def test_rotary_positions(check, call, words):
    """Of queries, each its own under a mask, and of new keys."""
    status, sentence = check(call)
    assert (status == LENGTHS) == bool(words) == bool(call.on_the_cpu())
    assert sentence.startswith(words) or status == OK


@st.composite
def calls(draw):
    batch = draw(st.integers(1, 3))

    def numbers(low, high):
        return [draw(st.integers(low, high)) for _ in range(batch)]

    seqlen_q = draw(st.integers(1, 12))
    page = st.integers(0, 3) | st.sampled_from([-1, 10**6])
    cached = numbers(0, Call.ROOM - 2)
    return Call(
        cached, seqlen_q=seqlen_q, new=draw(st.none() | st.integers(0, 3)), causal=draw(st.booleans()),
        used_q=numbers(0, seqlen_q) if draw(st.booleans()) else None, varlen_q=draw(st.booleans()),
        leftpad=numbers(0, Call.ROOM) if draw(st.booleans()) else None, rotary=(rotary := draw(st.booleans())),
        rotary_seqlens=numbers(-1, Call.POSITIONS + 1) if rotary and draw(st.booleans()) else None,
        pages=[[draw(page) for _ in range(4)] for _ in range(batch)] if draw(st.booleans()) else None)


@given(calls())
def test_as_the_cpu_refuses(check, call):
    status, _ = check(call)
    assert (status != OK) == bool(call.on_the_cpu())
