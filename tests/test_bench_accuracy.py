"""The benchmark of fp8's sums without a GPU: its rows, its float64, its records; made-up figures."""

import pytest
from bench_stand_ins import ROOT  # noqa: F401 - bench is found by it

from bench import accuracy, plot, records, shapes

ROWS = shapes.GROUPS["accuracy"]


def test_rows_go_from_1k_to_256k_keys():
    for values in (0, 1):
        keys = [row.seqlens_k[0] for row in ROWS if accuracy.mean(row) == values and len(row.seqlens_q) == 1]
        assert set(keys) >= {1024 << i for i in range(9)}
    assert sum(row.seqlens_q[0] >= accuracy.TIMED_QUERIES for row in ROWS) == 4


def test_a_row_is_run_with_each_interval(monkeypatch):
    import fa3

    asked = []
    monkeypatch.setattr(fa3, "flash_attn_func", lambda q, k, v, **options: asked.append(options))
    for choice in accuracy.candidates(None, None, None):
        choice.call()
    assert [options["fp8_accumulate"] for options in asked] == [0, 128, 256, 512, 1024, 2048]


def test_errors_are_relative_to_float64():
    torch = pytest.importorskip("torch")
    row = shapes.Row("accuracy", "small mean1", "fp8", (5,), (40,), 2, 2, 64)
    q, k, v = accuracy.problem(torch, row, "cpu")
    assert abs(float(v.float().mean()) - 1) < 0.1 and q.dtype == torch.float8_e4m3fn
    expected = accuracy.exact(torch, q, k, v)
    by_torch = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(expected, by_torch[0].transpose(0, 1))
    assert accuracy.relative_error(torch, 1.01 * expected[None], expected) == pytest.approx(0.01)


def test_results_are_kept_shown_and_drawn(tmp_path):
    errors = {"none": 0.2, "512": 1e-3}
    times = {name: 500.0 + 50 * (name != "none") for name in errors}
    entries = [accuracy.record(row, errors, times if row.seqlens_q[0] >= 4096 else {}, "Imaginary GPU", "0123abcd")
               for row in ROWS]
    path = records.save(tmp_path, entries)
    assert records.load(path) == entries
    assert "error_none" in path.with_suffix(".csv").read_text()
    lines = accuracy.table(entries).splitlines()
    assert lines[1].split()[-4:] == ["2.0e-01", "1.0e-03", "-", "-"]
    assert "none 1.000, 512 1.100" in accuracy.summary(entries)
    assert accuracy.summary(entries[:3]).endswith("not measured")
    pytest.importorskip("matplotlib")
    assert [image.suffix for image in plot.draw(path)] == [".png"]
