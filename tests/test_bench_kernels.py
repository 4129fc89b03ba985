"""The benchmark harness where it looks into fa3's own kernels, tiles and counters: stand-ins for fa3 and for ncu."""

import csv
import os
import sys
import types

import pytest
from bench_stand_ins import FakeClock, made_up_records

from bench import __main__ as command
from bench import counters, one_call, plot, records, runner, shapes, tiles, timing


class FakeCore:
    """`fa3._core` with three variants that fit head dim 80, and others that do not."""

    def __init__(self):
        self.tile = (0, 0)
        self.forced = []
        self.plans = []

    def variants(self):
        def variant(dtype, head_dim, head_dim_v, tile_m, tile_n, has_qv=False):
            return {"dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v, "tile_m": tile_m, "tile_n": tile_n,
                    "has_qv": has_qv}

        return [variant("bfloat16", 64, 64, 64, 128), variant("bfloat16", 80, 80, 64, 64),
                variant("float16", 80, 80, 64, 32), variant("bfloat16", 80, 80, 128, 128),
                variant("bfloat16", 80, 80, 192, 112), variant("bfloat16", 128, 128, 192, 80),
                variant("bfloat16", 192, 128, 128, 128), variant("bfloat16", 80, 80, 64, 48, has_qv=True)]

    def plan(self, **problem):
        self.plans.append(problem)
        return {"tile_m": 192, "tile_n": 112}

    def use_tile(self, tile_m, tile_n):
        self.tile = (tile_m, tile_n)
        self.forced.append(self.tile)


def _row(case):
    return next(row for row in shapes.GROUPS["tiles"] if row.case == case)


ROW = "bf16 d80 b16 s1024 h25 causal"


def test_the_sweep_of_tiles_covers_lengths_and_small_grids():
    rows = shapes.GROUPS["tiles"]
    for head_dim in (64, 80, 128, 192, 256):
        filling = {(row.seqlens_q[0], row.causal) for row in rows
                   if row.head_dim == head_dim and sum(row.seqlens_q) == 16384}
        assert {(64 << i, causal) for i in range(9) for causal in (False, True)} <= filling
        assert any(row.head_dim == head_dim and -(-row.seqlens_q[0] // 192) * row.num_heads < 132 for row in rows)


def test_variants_that_fit_are_those_of_the_plan():
    assert tiles.fitting(FakeCore(), _row(ROW)) == [(64, 64), (128, 128), (192, 112)]
    assert tiles.fitting(FakeCore(), _row("bf16 d128 b16 s1024 h16 full")) == [(192, 80)]
    with pytest.raises(NotImplementedError, match="no kernel for bf16 and head dim 256"):
        tiles.fitting(FakeCore(), _row("bf16 d256 b16 s1024 h8 full"))


def test_the_plan_is_asked_for_this_problem_on_this_gpu():
    core = FakeCore()
    assert tiles.planned(core, _row(ROW), 114) == "192x112"
    assert core.plans == [{"dtype": "bfloat16", "batch": 16, "seqlen_q": 1024, "seqlen_k": 1024, "num_heads": 25,
                           "num_heads_kv": 25, "head_dim": 80, "head_dim_v": 80, "causal": True, "num_sms": 114}]


def test_what_fa3_plans_is_among_what_is_timed():
    from fa3 import _core

    for row in shapes.rows("tiles", "^bf16 d128 "):
        names = [tiles.tile_name(*tile) for tile in tiles.fitting(_core, row)]
        assert tiles.planned(_core, row, 132) in names


@pytest.mark.parametrize("scale", [1, 0.01], ids=["launches", "graphs"])
def test_each_variant_is_timed_while_it_is_forced(scale):
    core, clock = FakeCore(), FakeClock()
    ms = {(64, 64): 1.5 * scale, (128, 128): 2 * scale, (192, 112): 3 * scale}
    choices = tiles.candidates(core, _row(ROW), lambda: setattr(clock, "now", clock.now + ms[core.tile]))
    times = timing.measure(choices, clock, timing.QUICK)
    assert times == pytest.approx({"64x64": 1500 * scale, "128x128": 2000 * scale, "192x112": 3000 * scale})
    assert core.tile == (0, 0)


def test_a_failing_call_leaves_the_choice_to_the_plan():
    core = FakeCore()
    choice = tiles.candidates(core, _row(ROW), lambda: None)[1]
    with pytest.raises(ZeroDivisionError), choice.context():
        assert core.tile == (128, 128)
        _ = 1 / 0
    assert core.forced == [(128, 128), (0, 0)]


def _answers(monkeypatch, core, off_by):
    """Let the problem of a row be a call whose result is `off_by` off with the variant of 128 rows."""
    torch = pytest.importorskip("torch")
    result = torch.ones(4)

    def call():
        return result + off_by * (core.tile[0] == 128)

    monkeypatch.setattr(tiles, "problem", lambda *_: (None, None, None, call))
    return torch


def test_a_variant_that_computes_something_else_is_wrong(monkeypatch):
    core = FakeCore()
    torch = _answers(monkeypatch, core, off_by=0.125)
    with pytest.raises(runner.WrongAnswerError, match=r"WRONG: 128x128 differs by 1\.25e-01"):
        tiles._measure(torch, core, FakeClock(), _row(ROW), timing.QUICK)
    assert core.tile == (0, 0)
    torch = _answers(monkeypatch, core, off_by=0.01)
    assert list(tiles._measure(torch, core, FakeClock(), _row(ROW), timing.QUICK)) == ["64x64", "128x128", "192x112"]


def _tile_records():
    times = {"64x64": 110.0, "128x128": 100.0, "192x112": 125.0}
    return [tiles.record(_row(case), times, plan, "Imaginary GPU", "0123abcd") for case, plan in (
        (ROW, "64x64"), ("bf16 d80 b1 s512 h8 full", "128x128"), ("bf16 d64 b1 s512 h8 full", "192x112"))]


def test_the_loss_of_the_plan():
    entries = _tile_records()
    assert [entry["loss"] for entry in entries] == [0.1, 0, 0.25]
    assert tiles.mean_loss(entries) == pytest.approx((1.1 * 1.25) ** (1 / 3) - 1)
    header, first, *_, last = tiles.table(entries).splitlines()
    assert header.split()[:4] == ["case", "plan", "best", "loss"]
    assert first.split() == [*ROW.split(), "64x64", "128x128", "10.0", "64x64", "110.0", "128x128", "100.0", "192x112",
                             "125.0"]
    assert last.split() == ["mean", "11.2"]
    assert tiles.summary(entries).splitlines() == [
        "mean loss: d80 4.9 %, d64 25.0 %", f"largest: bf16 d64 b1 s512 h8 full (25.0 %), {ROW} (10.0 %)"]
    assert tiles.summary(entries[1:2]).endswith("largest: none")


def test_results_of_tiles(tmp_path):
    entries = _tile_records()
    path = records.save(tmp_path, entries)
    assert path.name == "imaginary-gpu-tiles.json"
    assert records.load(path) == [entries[2], entries[0], entries[1]]  # in the order of the group
    with path.with_suffix(".csv").open(newline="") as file:
        lines = {line["case"]: line for line in csv.DictReader(file)}
    expected = {"plan": "64x64", "128x128_us": "100.0", "loss": "0.1", "head_dim": "80", "batch": "16", "causal": "1"}
    assert expected.items() <= lines[ROW].items()


def test_tiles_need_a_way_to_force_a_variant(monkeypatch, tmp_path, capsys):
    import fa3

    monkeypatch.setattr(fa3, "_core", types.SimpleNamespace())
    assert command.main(["tiles", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: this fa3 has no fa3._core.use_tile") and error.count("\n") == 1


# What ncu prints: the child's own lines, its remarks, a line of names, a line of units, a line of values.
RAW_PAGE = '''==PROF== Connected to process 4711
==PROF== Profiling "forward_kernel": 0%....50%....100% - 9 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes.sum","gpu__time_duration.sum","sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","","","","","","","","","","byte","ns","%","inst"
"0","4711","python3","127.0.0.1","void forward_kernel<Traits<int, 3>>(ForwardArgs)","1","7","(512, 1, 1)",\
"(132, 1, 1)","0","9.0","134,217,728","839,800","n/a","1.25"
==PROF== Disconnected from process 4711
'''
DETAILS_PAGE = '''"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4711","forward_kernel","Command line profiler metrics","dram__bytes.sum","byte","134217728"
"0","4711","forward_kernel","Command line profiler metrics","gpu__time_duration.sum","ns","839800"
"0","4711","forward_kernel","Command line profiler metrics","sm__cycles_elapsed.avg.per_second","hz","1.7e9"
'''


def test_parsing_a_raw_page():
    kernel, values = counters.parse(RAW_PAGE)
    assert kernel == "void forward_kernel<Traits<int, 3>>(ForwardArgs)"
    assert values == {"dram__bytes.sum": 134217728, "gpu__time_duration.sum": 839800,
                      "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": 1.25}


def test_parsing_a_details_page():
    kernel, values = counters.parse(DETAILS_PAGE)
    assert kernel == "forward_kernel"
    assert values == {"dram__bytes.sum": 134217728, "gpu__time_duration.sum": 839800,
                      "sm__cycles_elapsed.avg.per_second": 1.7e9}


@pytest.mark.parametrize("output", ["", "==WARNING== No kernels were profiled.\n",
                                    "\n".join(RAW_PAGE.splitlines()[:4])])
def test_no_kernel_in_the_output(output):
    with pytest.raises(ValueError, match="ncu saw no kernel named forward_kernel"):
        counters.parse(output)


def test_which_metrics_ncu_refuses():
    metrics = ["sm__pipe_xu.avg", "sm__pipe_xu_cycles.avg", "dram__bytes.sum"]
    said = "dram__bytes.sum\n==ERROR== Failed to find metric regex:^sm__pipe_xu(\\.|$)\n"
    assert counters.refused_metrics(said, metrics) == {"sm__pipe_xu.avg"}
    said = "==ERROR== Failed to find metric sm__pipe_xu_cycles\\.avg\n==ERROR== Failed to find metric dram__bytes.sum\n"
    assert counters.refused_metrics(said, metrics) == {"sm__pipe_xu_cycles.avg", "dram__bytes.sum"}
    assert counters.refused_metrics("all is well with dram__bytes.sum", metrics) == set()


FAKE_NCU = '''#!{python}
"""ncu as far as bench asks: some metrics are unknown to --query-metrics, some fail only when they are asked for."""
import csv, json, sys

arguments, log = sys.argv[1:], {log!r}
with open(log, "a") as file:
    print(json.dumps(arguments), file=file)
unlisted, refused, unmeasured, lists = {unlisted!r}, {refused!r}, {unmeasured!r}, {lists!r}
if "--query-metrics" in arguments:
    for name in {names!r}:
        if lists and name.split(".")[0] not in unlisted:
            print(name.split(".")[0].ljust(80), "Ratio", "a metric")
    sys.exit(0)
asked = arguments[arguments.index("--metrics") + 1].split(",")
for name in asked:
    if name.split(".")[0] in unlisted + refused:
        print("==ERROR== Failed to find metric regex:^" + name.replace(".", "\\\\.") + "$", file=sys.stderr)
        sys.exit(1)
print("what the child prints")
writer = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL, lineterminator="\\n")
writer.writerow(["ID", "Kernel Name", *asked])
writer.writerow(["", "", *("unit" for _ in asked)])
writer.writerow(["0", "forward_kernel", *("n/a" if name in unmeasured else 2e6 for name in asked)])
'''


@pytest.fixture
def fake_ncu(tmp_path):
    def make(unlisted=(), refused=(), unmeasured=(), lists=True):
        names = [metric for figure in counters.FIGURES + counters.STALLS for metric in figure.metrics]
        path, log = tmp_path / "ncu", tmp_path / "log"
        path.write_text(FAKE_NCU.format(python=sys.executable, log=str(log), unlisted=tuple(unlisted), lists=lists,
                                        refused=tuple(refused), unmeasured=tuple(unmeasured), names=names))
        path.chmod(0o755)
        return str(path), log

    return make


COUNTED = shapes.GROUPS["counters"][0]


def test_profiling_one_launch_of_the_kernel(fake_ncu, capsys):
    ncu, log = fake_ncu()
    kernel, values = counters.Profiler(ncu).profile(COUNTED)
    entry = counters.record(COUNTED, kernel, values, "Imaginary GPU", "0123abcd")
    assert entry["kernel"] == "forward_kernel"
    assert entry["figures"]["us"] == 2000 and entry["figures"]["dram_mb"] == 2 and entry["figures"]["xu_pct"] == 2e6
    assert None not in {**entry["figures"], **entry["stalls"]}.values()
    assert capsys.readouterr().err == ""
    arguments = log.read_text().splitlines()[-1]
    for expected in ('"--clock-control", "none"', '"--kernel-name", "regex:^forward_kernel$"', '"--launch-count", "1"',
                     f'"--launch-skip", "{counters.WARMUP_CALLS}"', '"--print-units", "base"',
                     f'"-m", "bench.one_call", "counters", "{COUNTED.case}", "{counters.WARMUP_CALLS + 1}"]'):
        assert expected in arguments


def test_what_is_profiled_calls_fa3_on_the_row_and_waits(monkeypatch):
    events = []
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(synchronize=lambda: events.append("wait")))
    monkeypatch.setattr(one_call, "import_torch", lambda: torch)
    monkeypatch.setattr(one_call, "problem", lambda _, row: (None, None, None, lambda: events.append(row.case)))
    one_call.main("counters", COUNTED.case, "2")
    assert events == [COUNTED.case, COUNTED.case, "wait"]


@pytest.mark.parametrize("lists", [True, False], ids=["listed", "not listed"])
def test_metrics_that_ncu_does_not_know_are_dropped_and_named_once(fake_ncu, capsys, lists):
    ncu, log = fake_ncu(
        unlisted=["sm__pipe_tensor_op_hmma_cycles_active", "lts__t_bytes"], lists=lists,
        refused=["sm__inst_executed_pipe_xu", "smsp__average_warps_issue_stalled_gmma_per_issue_active"],
        unmeasured=["dram__bytes.sum"])
    profiler = counters.Profiler(ncu)
    _, values = profiler.profile(COUNTED)
    entry = counters.record(COUNTED, "", values, "Imaginary GPU", "0123abcd")
    assert entry["figures"]["tensor_pct"] == 2e6 and entry["figures"]["xu_pct"] == 2e6  # by their second names
    missing = {key for key, value in {**entry["figures"], **entry["stalls"]}.items() if value is None}
    assert missing == {"l2_mb", "dram_mb", "gmma"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "bench: this ncu does not measure L2 MB (lts__t_bytes.sum)" in said
    runs = len(log.read_text().splitlines())
    profiler.profile(COUNTED)
    assert capsys.readouterr().err == ""
    assert len(log.read_text().splitlines()) == runs + 1  # what it does not know, it is not asked again


def test_why_ncu_failed(tmp_path):
    path = tmp_path / "ncu"
    path.write_text("#!/bin/sh\necho ==PROF== starting\necho '==ERROR== ERR_NVGPUCTRPERM: no permission' >&2\nexit 1\n")
    path.chmod(0o755)
    with pytest.raises(RuntimeError, match=f"^{COUNTED.case}: ==ERROR== ERR_NVGPUCTRPERM: no permission$"):
        counters.Profiler(str(path)).profile(COUNTED)


def test_without_ncu_one_sentence_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert command.main(["counters", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "bench: ncu (Nsight Compute) is not on the PATH, and the counters come from it\n")


def test_results_of_counters(tmp_path, capsys):
    values = counters.parse(RAW_PAGE)[1] | {
        f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio": ratio
        for reason, ratio in (("gmma", 3.5), ("barrier", 0.5), ("long_scoreboard", 2.0), ("drain", 0.25))}
    path = records.save(tmp_path, [counters.record(COUNTED, "forward_kernel", values, "Imaginary GPU", "0123abcd")])
    [entry] = records.load(path)
    assert entry["figures"]["us"] == 839.8 and entry["figures"]["xu_pct"] is None
    assert command.main(["report", "--output", str(tmp_path)]) == 0
    _, header, line, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["case", "µs", "GHz", "tensor"]
    assert line.split()[4:6] == ["839.8", "-"]
    assert line.endswith("gmma 3.50, long_scoreboard 2.00, wait 1.25")
    with path.with_suffix(".csv").open(newline="") as file:
        [cells] = csv.DictReader(file)
    assert (cells["us"], cells["xu_pct"], cells["stall_gmma"]) == ("839.8", "", "3.5")


def test_only_timed_groups_have_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    records.save(tmp_path, _tile_records())
    records.save(tmp_path, made_up_records("window"))
    assert plot.draw(tmp_path / "imaginary-gpu-tiles.json") == []
    assert command.main(["plot", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "imaginary-gpu-window.png")]
