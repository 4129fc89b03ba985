"""The host's plan of a forward call without a built package: src/plan.cpp and what it includes, compiled here."""

import ctypes

import numpy as np
import pytest
from compilers import HERE, SRC, host_library
from forward_params import Mask, Params
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_host_math import INT_MAX, MAX_ROWS, visible


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    parts = ("latent", "plan", "plan_estimate", "prepare_plan", "status", "validate")
    sources = [HERE / "host" / "plan.cpp", *(SRC / f"{name}.cpp" for name in parts)]
    return host_library(tmp_path_factory.mktemp("plan"), "plan", sources, f"-I{HERE / 'host' / 'cuda_names'}",
                        "-Wno-unknown-pragmas")


windows = st.one_of(st.integers(-1, 10), st.integers(MAX_ROWS - 2, MAX_ROWS + 2), st.integers(-1, INT_MAX))
lengths = st.one_of(st.integers(1, 20), st.integers(MAX_ROWS - 2, MAX_ROWS), st.integers(1, MAX_ROWS))


@given(st.booleans(), windows, windows, windows.map(lambda size: max(size, 0)), lengths, lengths, st.data())
@example(False, -1, -1, INT_MAX, 9, 4, None)
@example(False, INT_MAX, INT_MAX, 0, MAX_ROWS, 1, None)
@example(True, INT_MAX, INT_MAX, 0, 1, MAX_ROWS, None)
def test_every_mask_that_a_call_may_have(host, causal, left, right, chunk, seqlen_q, seqlen_k, data):
    """Windows and chunks up to the largest int, on lengths up to 2^30: as the formula says, without overflow."""
    row = data.draw(st.integers(0, seqlen_q - 1)) if data else 0
    interval = (ctypes.c_int * 2)()
    host.key_interval(ctypes.byref(Mask(causal, left, right, chunk)), row, seqlen_q, seqlen_k, interval)
    begin, end = interval
    keys = np.array(sorted({edge + step for edge in interval for step in (-1, 0, 1)} | {0, seqlen_k - 1}))
    seen = visible((left, 0 if causal else right, chunk), [row], seqlen_q, keys, seqlen_k)[0]
    assert np.array_equal((begin <= keys) & (keys < end), seen)


sizes_up_to_2_30 = st.sampled_from([1, 2, 65, 2**10, 2**15, 2**20, MAX_ROWS - 1, MAX_ROWS]) | st.integers(1, MAX_ROWS)


@pytest.fixture
def sanitized(capfd):
    """What is done here overflows nowhere."""
    yield
    assert "runtime error" not in capfd.readouterr().err


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*[sizes_up_to_2_30] * 5, st.sampled_from([1, 8, 64, 2**10, MAX_ROWS]), st.booleans(), st.booleans(),
       st.sampled_from([0, 1, 3, INT_MAX]), st.sampled_from([-1, 0, 1]), st.sampled_from([1, 132, 2**16]))
@example(1, 2**28, 1, 2**14, 1, 1, False, False, 0, -1, 132)
@example(2**14, 1, MAX_ROWS, MAX_ROWS, 1, 1, True, False, 0, -1, 132)
@example(1, MAX_ROWS, MAX_ROWS, 2**6, 2**6, 1, False, True, 0, 1, 132)
@example(MAX_ROWS, MAX_ROWS, 1, MAX_ROWS, 1, 1, False, False, 0, -1, 132)
def test_sizes_that_are_taken_overflow_nowhere(
        host, sanitized, batch, rows_q, rows_k, rows_new, num_heads_kv, ratio, causal, ragged, num_splits, pack_gqa,
        num_sms):
    """And too many are refused, by a sentence, before they are counted."""
    p = Params(struct_size=ctypes.sizeof(Params), dtype=2, out_dtype=2, batch=batch, num_heads_kv=num_heads_kv,
               num_heads=min(num_heads_kv * ratio, INT_MAX // num_heads_kv * num_heads_kv), head_dim=128,
               head_dim_v=128, softmax_scale=1, num_splits=num_splits, pack_gqa=pack_gqa)
    for array in (p.q, p.k, p.v, p.out):
        array.data, array.stride[3] = 4096, 1
    p.queries.rows, p.keys.rows = rows_q, rows_k
    p.queries.cu_seqlens = 4096 if ragged else None
    p.mask.causal, p.mask.window_left, p.mask.window_right = causal, -1, -1
    if rows_new <= rows_k:
        p.cache.k_new, p.cache.v_new, p.cache.rows_new = p.k, p.v, rows_new
    assert host.plan_checked(ctypes.byref(p), num_sms) in (0, -5)


LARGEST_FLOAT, LEAST_FLOAT = float(np.finfo(np.float32).max), 1e-45


@pytest.mark.parametrize("scale", [0.1, -0.1, 1.0, 1e-30, 1e-38, 1e30])
@pytest.mark.parametrize("cap", [0, 1e-3, 30, 1e9, 1e30, 1e37, 3e38, LARGEST_FLOAT, 1e-38, 1e-42, LEAST_FLOAT])
def test_scores_with_any_cap(host, scale, cap):
    """Exponents of 2 as the formula says, however large or small the cap."""
    found = (ctypes.c_float * 2)()
    host.score_scales(ctypes.c_float(scale), ctypes.c_float(cap), found)
    scale_log2, softcap_scale = map(float, found)
    assert np.isfinite([scale_log2, softcap_scale]).all()
    scale, cap = (float(np.float32(x)) for x in (scale, cap))
    for score in (0, 1e-3, 1, -20, 300):
        scaled = score * scale
        expected = (cap * np.tanh(scaled / cap) if cap else scaled) * np.log2(np.e)
        got = scale_log2 * (np.tanh(score * softcap_scale) if softcap_scale else score)
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize(("cap", "plain"), [(0, True), (30, False), (3e38, True)])
def test_a_cap_that_changes_no_score_is_none(host, cap, plain):
    """The plan takes the kernel that has none."""
    assert host.takes_plain_kernel(ctypes.c_float(cap)) == plain


@pytest.mark.parametrize(("dtype", "head_dim", "status"), [(3, 128, -10), (2, 256, -2), (1, 128, -2), (2, 128, 0)])
def test_what_a_build_lacks(host, dtype, head_dim, status):
    """Of bfloat16 at head dim 128 alone."""
    p = Params(struct_size=ctypes.sizeof(Params), dtype=dtype, out_dtype=2 if dtype == 3 else dtype, num_heads=1,
               num_heads_kv=1, head_dim=head_dim, head_dim_v=head_dim, softmax_scale=1)
    assert host.plan_checked(ctypes.byref(p), 132) == status


def test_the_plan_is_logged_in_one_line(host, capfd, monkeypatch):
    """FA3_LOG=plan, as fa3_forward logs it (which needs a GPU: there tests/test_c_api.py looks at its stderr)."""
    monkeypatch.setenv("FA3_LOG", "plan")
    assert host.plan_and_log(3, 500, 4) == 0
    line, nothing = capfd.readouterr().err.split("\n")
    assert nothing == ""
    for part in ("fa3 forward: batch 3, heads 4 on 4", "rows 500 on 500", "small (plain), tile 128 x 128", "grid 48"):
        assert part in line


@pytest.mark.parametrize("value", [None, "", "launch"])
def test_nothing_is_logged_unasked(host, capfd, monkeypatch, value):
    monkeypatch.delenv("FA3_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("FA3_LOG", value)
    assert host.plan_and_log(1, 5, 1) == 0
    assert capfd.readouterr().err == ""
