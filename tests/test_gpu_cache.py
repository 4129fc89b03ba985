"""What only a GPU shows of a cache that is written to: graphs, device arrays that lie, slow checks on request."""

import frameworks
import numpy as np
import pytest
from test_cache_update import pose
from test_prepare_kernel import Call, Case, as_the_cpu, same

import fa3

pytestmark = pytest.mark.gpu
cuda = frameworks.TorchCuda()


def ints(torch, *values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def test_a_graph_decodes_token_after_token(torch):
    """One captured step, replayed with other new keys and lengths, fills a cache as one call with all keys does."""
    steps, heads, dim = 9, 2, 64
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal((2, steps, heads, dim)).astype(np.float16)).cuda()
               for _ in range(3))
    angles = torch.from_numpy(rng.uniform(0, 6, (64, dim // 2)).astype(np.float32)).cuda()
    options = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "causal": True}
    first = ints(torch, 3, 40)
    caches = [torch.zeros((2, 64, heads, dim), dtype=torch.float16, device="cuda") for _ in range(4)]
    whole = fa3.flash_attn_with_kvcache(q, *caches[:2], k=k, v=v, cache_seqlens=first, **options)
    lengths = first.clone()
    one_q, one_k, one_v = (x[:, :1].clone() for x in (q, k, v))

    def step():
        return fa3.flash_attn_with_kvcache(one_q, *caches[2:], k=one_k, v=one_v, cache_seqlens=lengths, **options)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for i in range(steps):
        for one, every in ((one_q, q), (one_k, k), (one_v, v)):
            one.copy_(every[:, i:i + 1])
        graph.replay()
        assert (out[:, 0].float() - whole[:, i].float()).abs().max() < 2e-3
        lengths += 1
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


LIES = [-1, 7, 10**6, 2**31 - 1, -2**31]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", [
    "seqused_k", "cache_batch_idx", "rotary_seqlens", "cu_seqlens_k_new", "cache_leftpad"])
def test_arrays_that_lie_stay_inside_the_cache(torch, name, lie):
    """What another sequence gets is right; of the rows that lie nothing is asked but that all arrays stay whole."""
    case = Case(cached=(5, 4), new=(2, 2), layout="indexed", room=3, seqlens_q=(2, 2), rotary_dim=32, causal=True,
                varlen_new=True, rotary_seqlens=(5, 4))
    call = Call(case, 0)
    k, v, _, _ = as_the_cpu(call)
    sound = int(call.integers["cache_batch_idx"][0])
    leftpad = [0, lie] if name == "cache_leftpad" else None
    if name in call.integers:
        call.integers[name][-1] = lie
    before = call.k.copy()
    _, _, k_after, v_after = pose(cuda, call, leftpad)
    torch.cuda.synchronize()
    if name != "cu_seqlens_k_new" and not (name == "cache_batch_idx" and lie == sound):
        assert same(k_after[sound], k[sound]) and same(v_after[sound], v[sound])
    taken = {int(entry) for entry in call.integers["cache_batch_idx"]}
    for entry in set(range(len(before))) - taken:
        assert same(k_after[entry], before[entry]), "an entry that no sequence has"


@pytest.mark.parametrize(("name", "values", "said"), [
    ("seqused_k", (5, 9), "cache_seqlens: sequence 1 has 9 keys and gets 2, but has room for 10"),
    ("cache_batch_idx", (0, 9), "cache_batch_idx: 9 at 1, but it must be within 0 and 3"),
    ("rotary_seqlens", (-1, 0), "rotary_seqlens: -1 at 0")])
def test_lies_are_told_on_request(torch, monkeypatch, name, values, said):
    monkeypatch.setenv("FA3_CHECK", "1")
    call = Call(Case(cached=(5, 5), new=(2, 2), layout="indexed", room=3, seqlens_q=(1, 1), rotary_dim=32,
                     rotary_seqlens=(5, 5)), 0)
    pose(cuda, call, None)
    call.integers[name][...] = values
    with pytest.raises(ValueError, match=said):
        pose(cuda, call, None)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("page_size", [3, 16])
def test_page_tables_that_lie_stay_inside_the_pool(torch, page_size, lie):
    """The pool is a part of a buffer of NaN: what lies around it is neither read nor written."""
    case = Case(cached=(40, 44), new=(2, 2), layout="paged", page_size=page_size, seqlens_q=(2, 2), causal=True)
    call = Call(case, 0)
    k, v, _, _ = as_the_cpu(call)
    table = call.integers["page_table"]
    sound = table[0].copy()
    table[1, [0, -1]] = lie
    before = call.k.copy()
    out, lse, k_after, v_after = pose(cuda, call, None)
    torch.cuda.synchronize()
    if lie in range(len(before)):  # it names a page of someone's
        return
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()
    assert same(k_after[sound], k[sound]) and same(v_after[sound], v[sound])
    for page in set(range(len(before))) - {int(page) for page in table.reshape(-1)}:
        assert same(k_after[page], before[page]), "a page that no sequence has"


def test_pages_that_lie_are_told_on_request(torch, monkeypatch):
    monkeypatch.setenv("FA3_CHECK", "1")
    call = Call(Case(cached=(40, 44), layout="paged", page_size=16), 0)
    pose(cuda, call, None)
    call.integers["page_table"][1, 2] = 10**6
    with pytest.raises(ValueError, match=r"page_table: page 1000000 at \[1, 2\], but there are 8 pages"):
        pose(cuda, call, None)
