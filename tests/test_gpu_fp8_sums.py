"""Long sums of fp8 products: tensor cores keep 13 bits below the largest of what they add, so sums move on to fp32
every so many keys.

Values of mean 1 make every product of the same sign, which is the worst case. Rows whose largest score comes early or
late have totals that count relative to another maximum than what is added to them.
"""

import pytest
from gpu_problems import exact, tile

import fa3
from fa3 import _core

pytestmark = pytest.mark.gpu
KEYS = 5000  # no multiple of a block; more than the 4,096 that tiles without room for totals sum by default
TILES = [v for v in _core.variants() if v["dtype"] == "float8_e4m3fn"]
ROWS = 70
MOST = {1: 0.005, 512: 0.009, None: 0.03}  # relative error (RMS) by interval; measured 0.002, 0.0045, 0.022


def problem(torch, variant, growth=None):
    """q, k, v, and qv where the variant wants it; with `growth` keys are longer and longer along the sequence (or from
    its end on)."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(rows, heads, dim):
        return torch.randn((1, rows, heads, dim), generator=generator, device="cuda")

    k = normal(KEYS, 2, variant["head_dim"])
    if growth:
        ramp = torch.linspace(0.2, 2, KEYS, device="cuda")
        k *= (ramp if growth > 0 else ramp.flip(0))[:, None, None]
    # Values are turned before the kernel where many tiles see them, of which half is enough to make up for a mask.
    rows = 96 * variant["tile_m"] + ROWS if "_turned" in variant["name"] else ROWS
    arrays = [normal(rows, 4, variant["head_dim"]), k, normal(KEYS, 2, variant["head_dim_v"]) + 1]
    if variant["has_qv"]:
        arrays.append(normal(rows, 4, variant["head_dim_v"]))
    return [x.to(torch.float8_e4m3fn) for x in arrays]


def attention(q, k, v, qv=None, **options):
    return fa3.flash_attn_func(q, k, v, qv=qv, **options)


def error(torch, out, q, k, v, qv=None, causal=False):
    """Relative error (RMS) of the last rows against float64."""
    q, k, v, out = q[:, -ROWS:].double(), k.double(), v.double(), out[:, -ROWS:].double()
    if qv is not None:
        q, k = torch.cat([q, qv.double()], -1), torch.cat([k, v], -1)
    expected = exact(torch, q, k, v, causal)
    return float(((out - expected).square().mean() / expected.square().mean()).sqrt())


@pytest.mark.parametrize("variant", TILES, ids=lambda variant: variant["name"])
def test_the_interval_bounds_what_long_sums_lose(torch, variant):
    arrays = problem(torch, variant)
    with tile(variant):
        lost = {keys: error(torch, attention(*arrays, fp8_accumulate=keys, num_splits=1), *arrays)
                for keys in (0, *MOST)}
    assert all(lost[keys] <= most for keys, most in MOST.items()), lost
    assert lost[0] > 0.04, "or this test would see nothing"


@pytest.mark.parametrize("growth", [1, -1])
@pytest.mark.parametrize("variant", TILES, ids=lambda variant: variant["name"])
def test_totals_follow_their_row_s_maximum(torch, variant, growth):
    arrays = problem(torch, variant, growth)
    with tile(variant):
        for causal in (False, True):
            for splits in (1, 3):
                options = {"causal": causal, "num_splits": splits, "fp8_accumulate": 256}
                out = attention(*arrays, **options)
                assert error(torch, out, *arrays, causal=causal) <= 0.02, options
                assert torch.equal(out, attention(*arrays, **options)), "the same bits again"


@pytest.mark.parametrize("keys", [1, 64, 65, 129, 193, 300])
@pytest.mark.parametrize("variant", TILES, ids=lambda variant: variant["name"])
def test_few_blocks_have_no_totals_of_a_call_before(torch, variant, keys):
    q, k, v, *qv = problem(torch, variant)
    bad = torch.full_like(v.float(), float("nan")).to(v.dtype)
    with tile(variant):
        attention(q, k, bad, *qv, fp8_accumulate=1, num_splits=1)  # leaves its NaN where totals are
        out = attention(q, k[:, :keys], v[:, :keys], *qv, fp8_accumulate=1, num_splits=1)
    assert error(torch, out, q, k[:, :keys], v[:, :keys], *qv) <= 0.02


@pytest.mark.parametrize("variant", TILES[:1], ids=lambda variant: variant["name"])
def test_bits_do_not_depend_on_the_batch_where_that_is_asked_for(torch, variant):
    one = problem(torch, variant)
    two = [torch.cat([x, x.flip(1)]) for x in one]
    alone, together = (fa3.flash_attn_func(*arrays, batch_invariant=True) for arrays in (one, two))
    assert torch.equal(alone[0], together[0])
