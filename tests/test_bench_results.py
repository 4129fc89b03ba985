"""What the benchmark harness makes of figures: files, tables, plots, and its commands; made-up figures, no GPU."""

import csv
import json
import re

import pytest
from bench_stand_ins import made_up_records

from bench import __main__ as command
from bench import records, report, runner, shapes, timing


@pytest.mark.parametrize("group", shapes.TIMED)
def test_results_file(group, tmp_path):
    path = records.save(tmp_path, made_up_records(group))
    assert path.name == f"imaginary-gpu-{group}.json"
    entries = json.loads(path.read_text())
    assert [entry["case"] for entry in entries] == [row.case for row in shapes.GROUPS[group]]
    for entry in entries:
        more = ["deterministic_us"] if group == "backward" else []
        assert list(entry) == ["group", "case", "us", "tflops", "gbs", *more, "peers", "device", "date", "commit"]
        assert set(entry["peers"]) == {"cudnn", "fa2"}
        assert entry["group"] == group and entry["us"] > 0
        assert len(entry["date"]) == 10
        assert (entry["tflops"] is None) == (group == "overhead")
    assert records.load(path) == entries


def test_a_share_of_another_row_says_of_what():
    for group in ("forward", "window", "decode"):
        row = next(row for row in shapes.GROUPS[group] if row.bar_share)
        entries = [{"group": group, "case": case, "us": us, "tflops": 1 / us, "gbs": 1.0, "peers": {}}
                   for case, us in ((row.case, 100.0), (row.reference, 1.0))]
        assert f"{row.case} (0.010 of " in report.summary(entries)


def test_sums_in_one_order_have_their_bar():
    entries = made_up_records("backward")
    entries[3]["deterministic_us"] = 1.151 * entries[3]["us"]
    assert report.summary(entries).splitlines()[-1] == (
        f"below their bar: {entries[3]['case']} (1.151 of the time in one order for 1.15)")
    header, *lines, _mean = report.table(entries).splitlines()
    assert "in order" in header and lines[3].split()[-2] == "1.15"


def test_a_part_of_the_rows_leaves_the_others(tmp_path):
    entries = made_up_records("seed")
    records.save(tmp_path, entries)
    changed = {**entries[2], "us": 1.5}
    path = records.save(tmp_path, [changed])
    assert records.load(path) == [*entries[:2], changed, *entries[3:]]


def test_csv_has_the_figures_and_the_problem(tmp_path):
    entries = made_up_records("window")
    entries[2]["peers"] = {"cudnn": None, "fa2": None}
    path = records.save(tmp_path, entries)
    with path.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["case"] for line in lines] == [entry["case"] for entry in entries]
    windowed = lines[2]
    assert windowed["case"] == "bf16 d64 s16384 window1024 causal"
    expected = {"group": "window", "dtype": "bf16", "batch": "1", "max_seqlen_q": "16384", "num_heads_kv": "32",
                "head_dim": "64", "head_dim_v": "64", "causal": "1", "window_left": "1024", "window_right": "0",
                "us": "12.0", "tflops": str(entries[2]["tflops"]), "cudnn_us": "", "fa2_us": "", "commit": "0123abcd"}
    assert expected.items() <= windowed.items()
    assert lines[1]["cudnn_us"] == "13.0" and lines[1]["window_left"] == "-1"


def test_load_refuses_other_fields(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"case": "a"}]')
    with pytest.raises(ValueError, match="an entry has the fields"):
        records.load(path)


def test_ratios_and_table():
    entries = made_up_records("forward")
    entry = next(e for e in entries if e["case"] == "bf16 d64 s4096 full")
    over_cudnn, over_best = report.ratios(entry)
    assert over_cudnn == pytest.approx(entry["peers"]["cudnn"] / entry["us"])
    assert over_best == pytest.approx(over_cudnn / 1.12)
    lines = report.table(entries).splitlines()
    assert len(lines) == 1 + len(entries) + 1 and lines[-1].startswith("geometric mean")
    assert len({len(line) for line in lines}) == 1


def _entries(**us):
    """Records of the forward's rows that are named d<head_dim>_<mask>, of 4,096 keys: (fa3, cuDNN) in µs."""
    rows = {row.case: row for row in shapes.GROUPS["forward"]}
    cases = {"bf16 {} s4096 {}".format(*name.split("_")): times for name, times in us.items()}
    return [runner.record(rows[case], dict(zip(("fa3", "cudnn"), times, strict=False)), "Imaginary GPU", "0123abcd")
            for case, times in cases.items()]


def test_the_summary_counts_the_targets_alone():
    entries = _entries(d64_full=(100, 224), d64_causal=(100, 53), d128_full=(100, 109), d80_full=(100, 90),
                       d96_full=(1,))
    lines = report.summary(entries).splitlines()
    cudnn, best = (2.24 * 0.53 * 1.09) ** (1 / 3), (2 * 0.5 * 1.0) ** (1 / 3)
    assert lines == [
        f"3 rows of the targets: {cudnn:.2f} times as fast as cuDNN, {best:.2f} times as fast as the best peer, "
        "in the geometric mean",
        "of these slower than the best peer: bf16 d64 s4096 causal (0.500)",
        "slower than cuDNN: bf16 d64 s4096 causal (0.530), bf16 d80 s4096 full (0.900)",
        "below their bar: none"]


def test_the_summary_names_the_bars_that_are_missed():
    [row] = [row for row in shapes.GROUPS["forward"] if row.case == "bf16 d80 s4096 full"]
    reference = row.bar_us * 2048 / 2000  # d 128 at the same TFLOP/s: 25 heads of 80 fill but 2,000 dims
    fast, slow = row.bar_us * 0.99, row.bar_us * 1.12
    assert report.summary(_entries(d80_full=(fast,), d128_full=(reference,))) == "below their bar: none"
    assert report.summary(_entries(d80_full=(slow,), d128_full=(reference,))) == (
        f"below their bar: {row.case} ({slow:,.1f} µs for {row.bar_us:,.1f}), "
        f"{row.case} ({1 / 1.12:.3f} of next dim for 0.90)")


def test_the_share_of_the_full_row():
    entries = made_up_records("window")
    full, causal, windowed = entries[:3]
    full["tflops"], causal["tflops"], windowed["tflops"] = 600, 540, 450
    assert [report.share(entry, entries) for entry in entries[:3]] == [None, 0.9, 0.75]
    assert report.share(windowed, [windowed]) is None
    header, *lines, _mean = report.table(entries[:3]).splitlines()
    assert "of full" in header and [line.split()[-2] for line in lines] == ["-", "0.90", "0.75"]
    assert f"{windowed['case']} (0.750 of full for 0.80)" in report.summary(entries)


@pytest.mark.parametrize("group", shapes.TIMED)
def test_plot(group, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    records.save(tmp_path, made_up_records(group))
    assert command.main(["plot", "--output", str(tmp_path)]) == 0
    names = ("sweep-bf16", "sweep-fp16") if group == "sweep" else (group,)
    targets = [tmp_path / f"imaginary-gpu-{name}.png" for name in names]
    assert capsys.readouterr().out.split() == [str(target) for target in targets]
    assert all(target.read_bytes().startswith(b"\x89PNG") for target in targets)


def test_curves_show_the_results():
    pytest.importorskip("matplotlib")
    from bench import plot

    pairs = [(row, entry) for row, entry in zip(shapes.GROUPS["sweep"], made_up_records("sweep"), strict=True)
             if row.dtype == "fp16"]
    figure = plot._curves_figure(pairs, "fp16")
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        f"head dim {head_dim}, {mask}" for mask in ("full", "causal") for head_dim in (64, 128, 256)]
    axis = figure.axes[4]
    shown = [entry for row, entry in pairs if row.head_dim == 128 and row.causal]
    curves = {line.get_label(): line for line in axis.lines}
    assert list(curves) == ["FlashAttention-2", "cuDNN", "fa3"]
    assert curves["fa3"].get_xdata().tolist() == [512, 1024, 2048, 4096, 8192, 16384, 32768]
    assert curves["fa3"].get_ydata() == pytest.approx([entry["tflops"] for entry in shown])
    assert curves["cuDNN"].get_ydata() == pytest.approx(
        [entry["tflops"] * entry["us"] / entry["peers"]["cudnn"] for entry in shown])
    assert axis.get_ylim()[0] == 0 and axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["512", "1k", "2k", "4k", "8k", "16k", "32k"]


def test_decoding_is_shown_by_time_and_by_rate():
    pytest.importorskip("matplotlib")
    from bench import plot

    entries = made_up_records("decode")
    figure = plot._decode_figure(entries)
    time, rate = figure.axes
    labels = [label.get_text() for label in time.get_yticklabels()]
    assert labels == ["1 x 512 keys", "1 x 4,096 keys", "1 x 65,536 keys", "4 x 1,024 keys", "16 x 4,096 keys",
                      "16 x 32,768 keys", "128 x 2,048 keys", "128 x 8,192 keys"]
    at = labels.index("16 x 4,096 keys")
    named = {entry["case"]: entry for entry in entries}
    whole, pages = (named[f"bf16 b16 ctx4096 h64/8 d128 page{page}"] for page in ("None", 16))
    shown = {bars.get_label(): bars[at].get_width() for bars in time.containers}
    assert shown["fa3"] == whole["us"] and shown["of 16"] == pages["us"]
    assert shown["cuDNN"] == whole["peers"]["cudnn"]
    shown = {bars.get_label(): bars[at].get_width() for bars in rate.containers}
    assert shown["of 16"] == pytest.approx(pages["gbs"])
    assert shown["cuDNN"] == pytest.approx(whole["gbs"] * whole["us"] / whole["peers"]["cudnn"])
    assert list(shown) == ["fa3", "cuDNN", "pages of 256", "of 64", "of 16", "of 1"]
    assert [line.get_xdata()[0] for line in rate.lines] == [plot._COPY_GBS]


def test_some_rows_of_decoding_alone(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    entries = [entry for entry in made_up_records("decode") if entry["case"].endswith("page64")]
    assert [path.name for path in plot.draw(records.save(tmp_path, entries))] == ["imaginary-gpu-decode.png"]


def test_curves_of_a_part_of_the_sweep(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    entries = [entry for entry in made_up_records("sweep") if re.search(r"^bf16 d(64|128) .*causal", entry["case"])]
    for entry in entries:
        entry["peers"]["cudnn"] = None
    assert [path.name for path in plot.draw(records.save(tmp_path, entries))] == ["imaginary-gpu-sweep-bf16.png"]


def _prepare(outcomes, given):
    """A stand-in for `runner.prepare`: the outcomes one after another, whatever the row."""
    def prepare(budget, commit):
        given.extend([budget, commit])
        waiting = iter(outcomes)

        def run_row(_row):
            outcome = next(waiting)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return run_row

    return prepare


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    entries, given = made_up_records("window"), []
    outcomes = [entries[0], NotImplementedError("not yet"), runner.WrongAnswerError("WRONG: 3"), *entries[3:]]
    monkeypatch.setattr(runner, "prepare", _prepare(outcomes, given))
    assert command.main(["window", "--output", str(tmp_path), "--commit", "0123abcd"]) == 1
    assert given == [timing.Budget(), "0123abcd"]
    said = capsys.readouterr()
    assert f"not timed: {entries[1]['case']}: not yet\nnot timed: {entries[2]['case']}: WRONG: 3\n" in said.err
    assert "below their bar:" in said.out and str(tmp_path / "imaginary-gpu-window.json") in said.out
    assert records.load(tmp_path / "imaginary-gpu-window.json") == [entries[0], *entries[3:]]


def test_what_was_measured_stays_when_a_run_breaks_off(tmp_path, capsys, monkeypatch):
    entries = made_up_records("window")
    monkeypatch.setattr(runner, "prepare", _prepare([*entries[:2], RuntimeError("the GPU is lost")], []))
    assert command.main(["window", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bench: the GPU is lost\n"
    assert records.load(tmp_path / "imaginary-gpu-window.json") == entries[:2]


@pytest.mark.parametrize(("arguments", "budget"), [
    (["sweep"], timing.SWEEP), (["sweep", "--quick"], timing.QUICK), (["short"], timing.Budget())])
def test_each_group_has_its_budget(arguments, budget, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(runner, "prepare", _prepare([NotImplementedError()] * 100, given))
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    assert given[0] == budget


def test_report_prints_every_file_and_writes_csv(tmp_path, capsys):
    for group in ("window", "seed"):
        records.save(tmp_path, made_up_records(group))
    for path in tmp_path.glob("*.csv"):
        path.unlink()
    assert command.main(["report", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.index("imaginary-gpu-seed.json") < said.index("4 fp16") < said.index("imaginary-gpu-window.json")
    assert "rows of the targets" in said
    names = sorted(path.name for path in tmp_path.glob("*.csv"))
    assert names == ["imaginary-gpu-seed.csv", "imaginary-gpu-window.csv"]


def test_plot_of_nothing(tmp_path, capsys):
    assert command.main(["plot", "--output", str(tmp_path)]) == 2
    assert "no results there" in capsys.readouterr().err
