"""The benchmark harness without a GPU: its rows, its statistics on a made-up clock, its files and plots."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench is part of the checkout, not of the package; last, so that an installed fa3 is found

from bench import __main__ as command  # noqa: E402
from bench import report, runner, shapes, timing  # noqa: E402


def _square_cases(prefix, seqlens):
    return [f"{prefix} d{head_dim} s{seqlen} {mask}"
            for head_dim in (64, 128, 256) for seqlen in seqlens for mask in ("full", "causal")]


EXPECTED_CASES = {
    "forward": _square_cases("bf16", (1024, 4096, 16384)),
    "fp8": _square_cases("e4m3", (4096, 16384)),
    "backward": _square_cases("bf16", (1024, 4096, 16384)),
    "seed": ["1 fp8 b3 s1680 h16 d80", "1r fp8 b3 s<=1680 h16 d80", "1h fp16 b3 s1680 h16 d80",
             "2 fp8 b84 s64 h16 d80", "2h fp16 b84 s64 h16 d80", "3 fp16 b1 s1285 h16/2 d80 causal",
             "5 fp8 b84 t5040 h16 d128", "4 fp16 decode k2048 h16/2 d80"],
    "decode": [f"bf16 b{batch} ctx{context} h64/8 d128 page{page}"
               for batch, context in ((1, 4096), (1, 65536), (16, 4096), (16, 32768), (128, 2048), (128, 8192))
               for page in ("None", 16, 64, 256)],
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


@pytest.mark.parametrize(("case", "us", "tflops"), [
    ("bf16 d64 s1024 full", 327.5, 420), ("bf16 d64 s1024 causal", 203.3, 338), ("bf16 d128 s16384 full", 3244.1, 678),
    ("bf16 d256 s4096 causal", 431.5, 637),
])
def test_tflops_as_published_figures_count_them(case, us, tflops):
    row = next(row for row in shapes.GROUPS["forward"] if row.case == case)
    assert row.flops / us / 1e6 == pytest.approx(tflops, abs=0.7)


@pytest.mark.parametrize("group", ["fp8", "backward", "decode", "sideward"])
def test_a_group_that_is_not_built_says_which_are(group):
    with pytest.raises(ValueError, match="there are: forward, seed, overhead"):
        shapes.rows(group)


def test_rows_by_pattern():
    assert [row.case for row in shapes.rows("seed", "^3 ")] == ["3 fp16 b1 s1285 h16/2 d80 causal"]


class FakeClock:
    """A machine on which everything takes the time it says, and one launch in ten is disturbed."""

    clear_ms = 0.05

    def __init__(self):
        self.now = 0.0
        self.launches = 0

    def clear_cache(self):
        self.now += self.clear_ms

    def work(self, ms):
        self.launches += 1
        self.now += ms * (5 if self.launches % 10 == 0 else 1)

    def record(self):
        return self.now

    def elapsed_ms(self, start, end):
        return end - start

    def synchronize(self):
        pass

    def host_seconds(self):
        return self.now / 1e3

    def capture(self, work):
        return work


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


def _records(group, device="Imaginary GPU"):
    """Made-up figures: they live in a test's temporary folder only."""
    return [runner.record(row, {"fa3": 10.0 + at} if row.dtype == "fp8" else
                          {"fa3": 10.0 + at, "cudnn": 12.0 + at, "fa2": 20.0 + at}, device, "0123abcd")
            for at, row in enumerate(shapes.GROUPS[group])]


@pytest.mark.parametrize("group", shapes.BUILT)
def test_results_file(group, tmp_path):
    path = report.save(tmp_path, _records(group))
    assert path.name == f"imaginary-gpu-{group}.json"
    entries = json.loads(path.read_text())
    assert [entry["case"] for entry in entries] == [row.case for row in shapes.GROUPS[group]]
    for entry in entries:
        assert list(entry) == ["group", "case", "us", "tflops", "gbs", "peers", "device", "date", "commit"]
        assert set(entry["peers"]) == {"cudnn", "fa2"}
        assert entry["group"] == group and entry["us"] > 0
        assert len(entry["date"]) == 10
        assert (entry["tflops"] is None) == (group == "overhead")
    assert report.load(path) == entries


def test_a_part_of_the_rows_leaves_the_others(tmp_path):
    records = _records("seed")
    report.save(tmp_path, records)
    changed = {**records[2], "us": 1.5}
    entries = report.load(report.save(tmp_path, [changed]))
    assert entries == [*records[:2], changed, *records[3:]]


def test_load_refuses_other_fields(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"case": "a"}]')
    with pytest.raises(ValueError, match="an entry has the fields"):
        report.load(path)


def test_ratios_and_table():
    entry = next(e for e in _records("forward") if e["case"] == "bf16 d64 s4096 full")
    over_cudnn, over_best = report.ratios(entry)
    assert over_cudnn == pytest.approx(entry["peers"]["cudnn"] / entry["us"])
    assert over_best == pytest.approx(over_cudnn / 1.12)
    lines = report.table(_records("forward")).splitlines()
    assert len(lines) == 1 + 18 + 1 and lines[-1].startswith("geometric mean")
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("group", shapes.BUILT)
def test_plot(group, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report.save(tmp_path, _records(group))
    assert command.main(["plot", "--output", str(tmp_path)]) == 0
    target = tmp_path / f"imaginary-gpu-{group}.png"
    assert str(target) in capsys.readouterr().out
    assert target.read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing(tmp_path, capsys):
    assert command.main(["plot", "--output", str(tmp_path)]) == 2
    assert "no results there" in capsys.readouterr().err


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


@pytest.mark.skipif(not _has_gpu(), reason="no CUDA GPU with PyTorch here")
def test_a_row_on_the_gpu(tmp_path):
    assert command.main(["seed", "--quick", "--rows", "^2h ", "--output", str(tmp_path), "--commit", "test"]) == 0
    [path] = tmp_path.glob("*.json")
    [entry] = report.load(path)
    assert entry["us"] > 0 and entry["peers"]["fa2"] > 0
