"""The benchmark of quantize_fp8 without a GPU: its rows, its check, its records; made-up figures."""

import csv
import re

import pytest
from bench_stand_ins import ROOT  # noqa: F401  puts the checkout on the path

from bench import __main__ as command
from bench import quantize, records, runner, shapes

ROWS = shapes.GROUPS["quantize"]


def small(how, dtype="fp16"):
    return shapes.Row("quantize", f"{dtype} b2 s50 h3 d128 {how}", dtype, (50, 50), (50, 50), 3, 3, 128)


def test_names_tell_the_problem():
    assert len({row.case for row in ROWS}) == len(ROWS)
    for row in ROWS:
        dtype, batch, seqlen, heads, head_dim, granularity, *rotated = row.case.split()
        assert (dtype, batch, seqlen) == (row.dtype, f"b{len(row.seqlens_q)}", f"s{row.seqlens_q[0]}")
        assert (heads, head_dim) == (f"h{row.num_heads}", f"d{row.head_dim}")
        assert quantize.options(row) == {"granularity": granularity, "hadamard": bool(rotated)}
        assert granularity in ("tensor", "head", "batch_head") and rotated in ([], ["hadamard"])


def test_bytes_that_must_move():
    assert quantize.bytes_moved(small("head")) == 2 * 50 * 3 * 128 * 3
    assert quantize.bytes_moved(small("head", "fp32")) == 2 * 50 * 3 * 128 * 5


@pytest.mark.parametrize("how", ["tensor", "head", "batch_head", "tensor hadamard", "head hadamard",
                                 "batch_head hadamard"])
def test_the_check_finds_what_is_wrong(how):
    torch = pytest.importorskip("torch")
    row = small(how)
    x, call = quantize.problem(torch, row, "cpu")
    codes, descale = call()
    quantize.check(torch, row, x, codes, descale)
    codes.view(torch.uint8)[1, -1, 2, :9] ^= 0x18
    with pytest.raises(runner.WrongAnswerError, match=r"^WRONG: "):
        quantize.check(torch, row, x, codes, descale)


def test_the_copy_moves_as_many_bytes():
    torch = pytest.importorskip("torch")
    row = small("head")
    target = quantize.copy(torch, row, "cpu")()
    assert 2 * target.numel() == quantize.bytes_moved(row) and not target.any()


def test_results(tmp_path):
    entries = [quantize.record(row, {"fa3": 10.0, "copy": 7.0 + at}, "Imaginary GPU", "0123abcd")
               for at, row in enumerate(ROWS[:3])]
    path = records.save(tmp_path, entries)
    assert records.load(path) == entries
    with path.with_suffix(".csv").open(newline="") as file:
        assert next(csv.DictReader(file)).items() >= {"us": "10.0", "share": "0.7", "head_dim": "128"}.items()
    lines = quantize.table(entries).splitlines()
    assert re.fullmatch(rf"{ROWS[0].case} +10\.0 +10,066 +7\.0 +0\.70", lines[1])
    assert lines[-1].split() == ["geometric", "mean", f"{(0.7 * 0.8 * 0.9) ** (1 / 3):.2f}"]
    assert quantize.summary(entries) == f"below 80% of a copy's speed: {ROWS[0].case} (0.70)"
    assert quantize.summary(entries[1:]).endswith("none")


def test_the_command_without_a_gpu(capsys):
    try:
        runner.import_torch()
    except RuntimeError:
        assert command.main(["quantize"]) == 2
        assert capsys.readouterr().err.startswith("bench: ")
    else:
        pytest.skip("a GPU is here: the command would run")
