"""The benchmark harness without a GPU: its rows, its statistics on a made-up clock, its checks."""

import contextlib
import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from bench_stand_ins import ROOT, FakeClock

from bench import __main__ as command
from bench import backward, peers, records, runner, shapes, timing


def _square_cases(prefix, seqlens, head_dims=(64, 128, 256)):
    return [f"{prefix} d{head_dim} s{seqlen} {mask}"
            for head_dim in head_dims for seqlen in seqlens for mask in ("full", "causal")]


EXPECTED_CASES = {
    "forward": _square_cases("bf16", (1024, 4096, 16384))
    + _square_cases("bf16", (1024, 4096, 16384), (48, 80, 96, 112, 160, 192, "192/128")),
    "sweep": [case for dtype in ("bf16", "fp16")
              for case in _square_cases(dtype, (512, 1024, 2048, 4096, 8192, 16384, 32768))],
    "window": [f"bf16 d{head_dim} s16384 {mask}"
               for head_dim in (64, 128, 256) for mask in ("full", "causal", "window1024 causal")],
    "short": [f"bf16 {sizes} {mask}" for sizes in (
        "b84 s64 h16 d80", "b84 s64 h16 d128", "b32 s128 h16 d80", "b32 s128 h16 d128", "b16 s512 h16 d80",
        "b16 s512 h16 d128", "b1 s2048 h16 d80", "b1 s2048 h16 d128", "b1 s512 h8 d80", "b1 s512 h8 d128",
        "b4 s4096 h4 d80", "b4 s4096 h4 d128", *(f"b1 q{q} k4096 h{heads} d128" for heads in ("32/4", "64/8")
                                                 for q in (1, 4, 16, 64))) for mask in ("full", "causal")],
    "fp8": _square_cases("e4m3", (4096, 16384)) + [
        f"e4m3 {sizes} {mask}" for sizes in (
            "d64 s1024", "d80 s4096", "d128 s1024", "d192 s4096", "d256 s1024",
            *(f"d{head_dim} {sizes} h16" for sizes in ("b84 s64", "b16 s512", "b1 s2048") for head_dim in (64, 128)))
        for mask in ("full", "causal")],
    "backward": _square_cases("bf16", (1024, 4096, 16384)) + [
        f"bf16 {sizes} {mask}" for sizes in (
            *(f"d{dims} s4096" for dims in (80, 96, 112, 160, 192, "192/128")), "d128 s1024 h16/2", "d128 s4096 h16/2",
            "d64 b16 s<=2048 h32", "d128 b16 s<=2048 h16") for mask in ("full", "causal")],
    "dropout": [f"bf16 d{head_dim} s{seqlen}{dropout} {mask}" for head_dim in (64, 80, 128, 256)
                for seqlen in (1024, 4096) for mask in ("full", "causal") for dropout in ("", " dropout")],
    "seed": ["1 fp8 b3 s1680 h16 d80", "1r fp8 b3 s<=1680 h16 d80", "1h fp16 b3 s1680 h16 d80",
             "2 fp8 b84 s64 h16 d80", "2h fp16 b84 s64 h16 d80", "3 fp16 b1 s1285 h16/2 d80 causal",
             "5 fp8 b84 t5040 h16 d128", "4 fp16 decode k2048 h16/2 d80"],
    "decode": [f"bf16 b{batch} ctx{context} h64/8 d128 page{page}"
               for batch, context in ((1, 512), (1, 4096), (1, 65536), (4, 1024), (16, 4096), (16, 32768), (128, 2048),
                                      (128, 8192)) for page in ("None", 1, 16, 64, 256)],
    "mla": [f"bf16 b{batch} ctx{context} page{page} h{heads}"
            for batch, context in ((1, 4096), (1, 32768), (16, 4096), (16, 32768), (128, 4096), (128, 8192))
            for heads in (16, 64, 128) for page in ("None", 64)] + [
                f"e4m3 b{batch} ctx{context} page{page} h{heads}"
                for batch, context in ((1, 32768), (16, 32768), (128, 8192))
                for heads in (16, 64, 128) for page in ("None", 64)] + [
                    f"{dtype} s4096 causal h{heads}" for dtype in ("bf16", "e4m3") for heads in (16, 128)],
}


@pytest.mark.parametrize("group", EXPECTED_CASES)
def test_rows_are_complete(group):
    assert [row.case for row in shapes.GROUPS[group]] == EXPECTED_CASES[group]


def test_rows_are_what_they_are_called():
    rows = {row.case: row for row in shapes.GROUPS["forward"] + shapes.GROUPS["seed"]}
    row = rows["bf16 d64 s1024 causal"]
    assert (len(row.seqlens_q), row.seqlens_q[0], row.num_heads, row.head_dim) == (16, 1024, 32, 64)
    assert sum(rows["5 fp8 b84 t5040 h16 d128"].seqlens_q) == 5040
    assert len(rows["5 fp8 b84 t5040 h16 d128"].seqlens_q) == 84
    assert max(rows["1r fp8 b3 s<=1680 h16 d80"].seqlens_q) <= 1680


@pytest.mark.parametrize("group", ["forward", "sweep", "window", "short", "tiles", "counters"])
def test_names_tell_the_problem(group):
    cases = [row.case for row in shapes.GROUPS[group]]
    assert len(set(cases)) == len(cases)
    for row in shapes.GROUPS[group]:
        dtype, *words = row.case.split()
        sizes = {found[1]: found[2].split("/") for word in words if (found := re.fullmatch(r"([a-z]+)([\d/]+)", word))}
        head_dim, head_dim_v = int(sizes["d"][0]), int(sizes["d"][-1])
        seqlen_q, seqlen_k = (int(sizes[name if name in sizes else "s"][0]) for name in "qk")
        batch = int(sizes["b"][0]) if "b" in sizes else max(16384 // seqlen_k, 1)
        heads = sizes.get("h", [max(1, 2048 // head_dim)])
        assert (row.dtype, row.head_dim, row.dim_v) == (dtype, head_dim, head_dim_v)
        assert (row.seqlens_q, row.seqlens_k) == ((seqlen_q,) * batch, (seqlen_k,) * batch)
        assert (row.num_heads, row.num_heads_kv) == (int(heads[0]), int(heads[-1]))
        assert row.causal == (words[-1] == "causal") and row.causal != (words[-1] == "full")
        assert row.window == ((int(sizes["window"][0]), 0) if "window" in sizes else (-1, -1))


@pytest.mark.parametrize(("group", "case", "us", "tflops"), [
    ("forward", "bf16 d64 s1024 full", 327.5, 420), ("forward", "bf16 d64 s1024 causal", 203.3, 338),
    ("forward", "bf16 d128 s16384 full", 3244.1, 678), ("forward", "bf16 d256 s4096 causal", 431.5, 637),
    ("backward", "bf16 d128 s4096 full", 2411.9, 570), ("fp8", "e4m3 d64 s16384 causal", 1753.9, 627),
])
def test_tflops_as_published_figures_count_them(group, case, us, tflops):
    row = next(row for row in shapes.GROUPS[group] if row.case == case)
    assert row.flops / us / 1e6 == pytest.approx(tflops, abs=0.7)


def test_flops_and_bytes_of_two_head_dims_and_a_window():
    row = shapes.Row("window", "", "bf16", (7,), (9,), 6, 2, 24, 16, causal=True, window=(3, 0))
    pairs = sum(query + 2 - 3 <= key <= query + 2 for query in range(7) for key in range(9))
    assert row.flops == 6 * pairs * (2 * 24 + 2 * 16)
    assert row.bytes_moved == 2 * (7 * 6 * (24 + 16) + 9 * 2 * (24 + 16))


def test_latent_rows_are_read_once():
    row = shapes.rows("mla", "^bf16 b1 ctx4096 pageNone h16$")[0]
    assert row.flops == 2 * 16 * 4096 * (576 + 512)
    assert row.bytes_moved == 2 * (16 * (576 + 512) + 4096 * 576)


def test_an_unknown_group_says_which_there_are():
    groups = ("forward, sweep, window, short, fp8, seed, overhead, decode, mla, backward, dropout, tiles, quantize, "
              "accuracy, counters")
    with pytest.raises(ValueError, match=f"^group 'sideward' is unknown; there are: {groups}$"):
        shapes.rows("sideward")


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "cudnn", None)
    q = torch.zeros(1, 16, 2, 64).to(torch.float8_e4m3fn)
    row = shapes.Row("fp8", "small", "fp8", (16,), (16,), 2, 2, 64)
    assert peers.peer_candidates(row, q, q, q, torch.zeros(q.shape)) == []
    assert "small: cudnn is left out, cudnn (nvidia-cudnn-frontend) is not importable" in capsys.readouterr().err


def test_rows_by_pattern():
    assert [row.case for row in shapes.rows("seed", "^3 ")] == ["3 fp16 b1 s1285 h16/2 d80 causal"]
    targets = [row for row in shapes.GROUPS["forward"] if row.best_over_cudnn is not None]
    assert len(targets) == 18 and targets == shapes.rows("forward", "^bf16 d(64|128|256) ")


def test_padded_head_dims_are_held_against_the_next_multiple_of_64():
    rows = {row.case: row for row in shapes.GROUPS["forward"]}
    held = [row for row in rows.values() if row.reference is not None]
    assert {row.head_dim for row in held} == {48, 80, 112, 160}
    for row in held:
        reference = rows[row.reference]
        assert reference.head_dim == reference.dim_v == (row.head_dim // 64 + 1) * 64
        assert (reference.seqlens_q, reference.causal, row.bar_share) == (row.seqlens_q, row.causal, 0.9)
    row = rows["bf16 d80 s4096 full"]
    assert row.flops / row.bar_us / 1e6 == pytest.approx(560)
    assert [row.case for row in rows.values() if row.bar_us] == ["bf16 d80 s4096 full"]


def _candidates(clock, **ms):
    return [timing.Candidate(name, lambda each=each: clock.work(each)) for name, each in ms.items()]


def test_launches_give_the_median_without_the_clearing():
    clock = FakeClock()
    times = timing.measure_launches(_candidates(clock, fa3=0.25, cudnn=0.5), clock)
    assert times == pytest.approx({"fa3": 250, "cudnn": 500})
    sustained = 3 * (125 / (0.5 + clock.clear_ms))
    assert clock.launches > sustained


def test_estimate():
    clock = FakeClock()
    assert timing.estimate_us(_candidates(clock, fa3=0.03)[0], clock) == pytest.approx(30)


def test_graphs_give_the_difference_to_the_clearings():
    clock = FakeClock()
    clock.work = lambda ms: setattr(clock, "now", clock.now + ms)
    times = timing.measure_graphs(_candidates(clock, fa3=0.006, cudnn=0.011), clock, timing.QUICK)
    assert times == pytest.approx({"fa3": 6, "cudnn": 11})


def test_host_time_per_call():
    clock = FakeClock()
    clock.work = lambda ms: setattr(clock, "now", clock.now + ms)
    assert timing.measure_host(_candidates(clock, fa3=0.008), clock) == pytest.approx({"fa3": 8})


def test_each_candidate_runs_in_its_context():
    clock, entered = FakeClock(), []

    @contextlib.contextmanager
    def context():
        entered.append(True)
        yield
        entered.pop()

    inside = []
    candidate = timing.Candidate("cudnn", lambda: (clock.work(1.0), inside.append(bool(entered))), context)
    timing.measure_launches([candidate], clock, timing.QUICK)
    timing.measure_host([candidate], clock, calls=3, rounds=1)
    assert all(inside) and not entered


def test_a_short_call_is_measured_as_a_graph():
    clock = FakeClock()
    captured = []
    clock.capture = lambda work, capture=clock.capture: captured.append(work) or capture(work)
    timing.measure(_candidates(clock, fa3=0.2, cudnn=0.05), clock, timing.QUICK)
    assert not captured
    timing.measure(_candidates(clock, fa3=0.05, cudnn=0.2), clock, timing.QUICK)
    assert len(captured) == 3  # the clearings, and each candidate


SMALL = shapes.Row("short", "small", "bf16", (37,) * 5, (37,) * 5, 8, 4, 32, 16, causal=True, window=(5, 0))
RAGGED = shapes.Row("seed", "ragged", "fp16", (3, 0, 20), (3, 7, 20), 4, 2, 16, causal=True, varlen=True)


CACHE = shapes.Row("decode", "cache", "bf16", (1,) * 3, (64,) * 3, 8, 2, 32, causal=True)
LATENT = shapes.Row("mla", "latent", "bf16", (1,) * 3, (64,) * 3, 8, 1, 576, 512, causal=True)
CACHES = {f"{row.case} {page}": dataclasses.replace(row, page=page) for row in (CACHE, LATENT) for page in (None, 16)}


DROPPED = dataclasses.replace(SMALL, case="dropped", dropout_p=0.5)


@pytest.mark.parametrize("row", [SMALL, DROPPED, RAGGED, *CACHES.values()], ids=["dense", "dropped", "ragged", *CACHES])
@pytest.mark.parametrize("wrong", [None, 0.1, float("nan")])
def test_the_check_finds_what_is_wrong(row, wrong):
    torch = pytest.importorskip("torch")
    q, k, v, call = runner.problem(torch, row, "cpu")
    assert v.shape[-1] == row.dim_v and k.shape[-2] == row.num_heads_kv
    out = call()
    if wrong is None:
        runner.check(torch, row, q, k, v, out)
        return
    if row.dropout_p and wrong == 0.1:  # only the first sequence's first KV heads are looked at
        out.view(5, 37, 8, row.dim_v)[0, -1, 5, -1] += wrong
    else:
        out.view(-1, row.dim_v)[-1, -1] += wrong  # the last head of the last query
    with pytest.raises(runner.WrongAnswerError, match=r"^WRONG: "):
        runner.check(torch, row, q, k, v, out)


GRADIENTS = [dataclasses.replace(SMALL, group="backward", window=(-1, -1)),
             dataclasses.replace(RAGGED, group="backward")]


@pytest.mark.parametrize("row", GRADIENTS, ids=lambda row: row.case)
@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
def test_the_check_finds_wrong_gradients(row, wrong):
    torch = pytest.importorskip("torch")
    inputs, call = backward.problem(torch, row, "cpu")
    gradients = call()
    if wrong is None:
        backward.check(row, inputs, gradients)
        return
    gradients[wrong].view(-1, gradients[wrong].shape[-1])[-1, -1] += 0.5
    with pytest.raises(runner.WrongAnswerError, match=r"^WRONG: "):
        backward.check(row, inputs, gradients)


@pytest.mark.parametrize("row", GRADIENTS, ids=lambda row: row.case)
def test_gradients_of_peers(row):
    """PyTorch has an FA2 of its own for the CPU, but not for sequences of unequal lengths."""
    torch = pytest.importorskip("torch")
    row = dataclasses.replace(row, num_heads_kv=row.num_heads, seqlens_q=row.seqlens_k, head_dim_v=None)
    inputs, call = backward.problem(torch, row, "cpu")
    found = backward._peers(torch, row, inputs, call())
    assert [peer.name for peer in found] == ([] if row.varlen else ["fa2"])


def test_the_check_looks_for_nan_where_it_takes_no_sample():
    torch = pytest.importorskip("torch")
    q, k, v, call = runner.problem(torch, SMALL, "cpu")
    out = call()
    looked_at = runner._sample(5)
    assert looked_at[0] == 0 and looked_at[-1] == 4
    [unseen, *_] = {0, 1, 2, 3, 4} - set(looked_at)
    out[unseen, 3, 1, 0] = float("inf")
    with pytest.raises(runner.WrongAnswerError, match="not every value of out is finite"):
        runner.check(torch, SMALL, q, k, v, out)


def test_peers_take_no_window_and_only_what_they_compute_alike(capsys):
    torch = pytest.importorskip("torch")
    row = shapes.Row("short", "plain", "bf16", (16,) * 2, (16,) * 2, 4, 4, 32)
    q, k, v, call = runner.problem(torch, row, "cpu")
    out = call()
    assert [peer.name for peer in peers.peer_candidates(row, q, k, v, out)] == ["fa2"]  # PyTorch has one for the CPU
    assert peers.peer_candidates(row, q, k, v, out + 1) == []
    assert "plain: fa2 is left out" in capsys.readouterr().err
    windowed = shapes.Row("short", "windowed", "bf16", (16,) * 2, (16,) * 2, 4, 4, 32, window=(15, 15))
    assert peers.peer_candidates(windowed, q, k, v, out) == []


def test_the_sweep_ends_within_five_minutes():
    """What its budget asks of the GPU, were all three as slow as 400 TFLOP/s; checks and cuDNN's set-up come on top."""
    seconds = 0.0
    for row in shapes.GROUPS["sweep"]:
        launch = row.flops / 400e12 + 60e-6  # with the clearing
        seconds += 3 * timing.SWEEP.rounds * (6 * launch + sum(
            max(launch, ms / 1e3) for ms in (timing.SWEEP.warmup_ms, timing.SWEEP.launch_ms)))
    assert seconds < 120


def test_commit_from_the_environment(monkeypatch):
    monkeypatch.setenv("FA3_BENCH_COMMIT", "feedc0de")
    assert runner.current_commit() == "feedc0de"


def _has_gpu():
    try:
        runner.import_torch()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(_has_gpu(), reason="a GPU is here: the command would run")
def test_without_a_gpu_one_line_says_so():
    done = subprocess.run([sys.executable, "-m", "bench", "forward"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("bench: ") and done.stderr.count("\n") == 1


def test_without_fa3_one_line_says_so():
    code = "import sys; sys.modules['fa3'] = None; import runpy; runpy.run_module('bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "report"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("bench: ") and "fa3" in done.stderr and done.stderr.count("\n") == 1


def test_the_help_names_every_group(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        command.main(["--help"])
    assert ", ".join(shapes.GROUPS).replace(", counters", " or counters") in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(shutil.which("cc") is None and not _has_gpu(), reason="needs a C compiler, or a GPU")
def test_host_profile():
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-m", "bench.host_profile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    title, *lines = done.stdout.splitlines()
    us = {name.strip(): float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
    assert title.startswith("PyTorch ") and us["call"] > us["views of q, k, v"] > 0
    assert set(us) >= {"call, out=", "libfa3 and launch", "result array"}


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is here: the command would run")
def test_host_profile_of_a_framework_that_is_not_here():
    command_line = [sys.executable, "-m", "bench.host_profile", "cupy"]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bench.host_profile: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not _has_gpu(), reason="no CUDA GPU with PyTorch here")
def test_a_row_on_the_gpu(tmp_path):
    assert command.main(["seed", "--quick", "--rows", "^2h ", "--output", str(tmp_path), "--commit", "test"]) == 0
    [path] = tmp_path.glob("*.json")
    [entry] = records.load(path)
    assert entry["us"] > 0 and entry["peers"]["fa2"] > 0
