"""The command line: small variants of the cases of every day, both spellings of flags, exit codes."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import fa3
from fa3 import _core, _numpy, _run_device, cli
from fa3 import _reference_check as check
from fa3._progress import Progress
from fa3._run_problem import parse_seqlens

SMALL_CASES = {
    "1 fp8": "--fp8 --batch_size 3 --max_seqlen_q 168 --max_seqlen_k 168 --num_heads 4 --head_size 80 --fixed",
    "1r fp8": "--fp8 --batch_size 3 --max_seqlen_q 168 --max_seqlen_k 168 --num_heads 4 --head_size 80",
    "1 fp16": "--fp16 --batch_size 3 --max_seqlen_q 168 --max_seqlen_k 168 --num_heads 4 --head_size 80 --fixed",
    "2 fp8": "--fp8 --batch_size 9 --max_seqlen_q 64 --max_seqlen_k 64 --num_heads 4 --head_size 80 --fixed",
    "2 fp16": "--fp16 --batch_size 9 --max_seqlen_q 64 --max_seqlen_k 64 --num_heads 4 --head_size 80 --fixed",
    "3": "--fp16 --batch_size 1 --max_seqlen_q 135 --max_seqlen_k 135 --num_heads 16 --num_heads_k 2 --head_size 80 "
         "--causal",
    "4": "--fp16 --batch_size 1 --max_seqlen_q 1 --max_seqlen_k 300 --num_heads 16 --num_heads_k 2 --head_size 80 "
         "--causal --fixed",
    "4 in pages": "--fp16 --batch_size 1 --max_seqlen_q 1 --max_seqlen_k 300 --num_heads 16 --num_heads_k 2 "
                  "--head_size 80 --causal --fixed --page_size 16",
    "4 in odd pages": "--fp16 --batch_size 3 --max_seqlen_q 1 --max_seqlen_k 300 --num_heads 16 --num_heads_k 2 "
                      "--head_size 80 --causal --page_size 13 --seqused_k --return_lse",
    "5": "--fp8 --seqlens 64x3,48x2,64x2 --num_heads 4 --head_size 128 --q_descale 1 --k_descale 1 --v_descale 1",
    "6 prefill": "--fp16 --batch_size 2 --max_seqlen_q 96 --max_seqlen_k 96 --num_heads 4 --head_size 192 --causal "
                 "--fixed",
    "6 decode": "--fp16 --batch_size 4 --max_seqlen_q 1 --max_seqlen_k 200 --num_heads 16 --num_heads_k 2 "
                "--head_size 128 --fixed",
    "7": "--fp16 --batch_size 1 --max_seqlen_q 128 --max_seqlen_k 128 --num_heads 8 --head_size 64 --causal --fixed "
         "--dropout_p 0.1 --backward",
    "bf16": "--bf16 --batch_size 2 --max_seqlen_q 70 --max_seqlen_k 90 --num_heads 6 --num_heads_k 2 --head_size 64",
}
OPTIONS = {
    "window": "--window_size 10 3",
    "left window": "--causal --window_size 9 -1",
    "chunk": "--attention_chunk 32",
    "softcap": "--softcap 5.5 --softmax_scale 0.5",
    "sinks": "--sinks --causal --return_lse",
    "lse": "--return_lse",
    "seqused": "--seqused_q --seqused_k --return_lse",
    "other head dim": "--head_size_v 48",
    "qv": "--qv --head_size_v 64",
    "paged": "--page_size 16 --seqused_k",
    "splits": "--num_splits 3 --page_size 8",
    "batch_invariant": "--batch_invariant --no_pack_gqa --sm_margin 2",
    "dropout": "--dropout_p 0.3 --dropout_seed 12345678901 --return_lse",
    "backward": "--backward --bf16 --head_size_v 48 --num_splits 2 --batch_invariant --no_pack_gqa",
    "backward, left window": "--backward --causal --window_size 9 -1 --softcap 5.5 --softmax_scale 0.5",
    "backward, everything": "--backward --attention_chunk 32 --sinks --seqused_q --seqused_k --dropout_p 0.2",
    "backward, deterministic": "--backward --deterministic --causal",
    "fp8 sums": "--fp8 --fp8_accumulate 64",
    "lengths of keys": "--seqlens 40x2,7 --seqlens_k 70,3x2",
    "fp8 latent": "--fp8 --qv --q_descale 0.5 --k_descale 4 --v_descale 0.25 --return_lse",
    "fp8 descales": "--fp8 --q_descale 0.5 --k_descale 2.5 --v_descale 3 --out_dtype fp16",
}
FEW = "--batch_size 3 --max_seqlen_q 40 --max_seqlen_k 70 --num_heads 4 --num_heads_k 2 --head_size 32 --no_time"


def run(flags):
    return cli.main(["run", "--device", "cpu", *flags.split()])


@pytest.mark.parametrize("name", SMALL_CASES)
def test_cases(name, capsys):
    assert run(SMALL_CASES[name] + " --no_time") == 0
    out = capsys.readouterr().out
    assert "check     ok" in out
    assert out.startswith(f"problem   {SMALL_CASES[name].split()[0][2:]}, ")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL_CASES)
def test_cases_on_the_gpu(name, capsys):
    pytest.importorskip("torch")
    assert cli.main(["run", "--device", "gpu", *SMALL_CASES[name].split()]) == 0
    assert "check     ok" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_cupy_on_the_gpu(dtype, monkeypatch, capsys):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(_run_device, "choose_device", lambda wanted: _run_device.CupyDevice(cupy))
    assert cli.main(["run", f"--{dtype}", "--batch_size", "3", "--max_seqlen_q", "90", "--causal"]) == 0
    out = capsys.readouterr().out
    assert "CuPy" in out and "check     ok" in out


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, capsys):
    assert run(f"{FEW} {OPTIONS[name]}") == 0
    assert "check     ok" in capsys.readouterr().out


def test_what_is_printed(capsys):
    assert run("--fp16 --batch_size 2 --max_seqlen_q 64 --num_heads 4 --head_size 64 --fixed --causal") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["problem", "device", "time", "speed", "check"]
    assert "batch_size 2, seqlen_q 64, seqlen_k 64, heads 4, head_size 64, causal" in lines[0]
    assert "CPU, NumPy" in lines[1]
    assert "TFLOP/s" in lines[3] and "GB/s" in lines[3]
    assert lines[4].startswith("check     ok: all 512 rows")


@pytest.mark.parametrize(("value", "printed"), [
    (0, "0"), (7.09e-5, "0.0000709"), (0.5, "0.500"), (9.876, "9.88"), (99.96, "100.0"), (655.4, "655"),
    (4293.4, "4,293")])
def test_figures_have_no_exponent(value, printed):
    assert cli._digits(value) == printed


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    program = subprocess.Popen([sys.executable, "-P", "-m", "fa3", "info"], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == cli.CLOSED_PIPE


def test_what_is_printed_of_gradients(capsys):
    assert run("--batch_size 2 --max_seqlen_q 64 --num_heads 4 --head_size 64 --fixed --backward --dropout_p 0.1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["problem", "device", "time", "speed", "check", "gradients"]
    assert lines[0].endswith("full, dropout_p 0.1, dropout_seed 0, backward")
    assert lines[4].startswith("check     ok: all 512 rows") and ", lse " in lines[4]
    assert lines[5].startswith("gradients ok: all 1,536 rows")


def test_both_spellings_as_a_program(tmp_path):
    underscores = ["--batch_size", "2", "--max_seqlen_q=33", "--num_heads", "4", "--num_heads_k", "2", "--head_size",
                   "64", "--no_time", "--window_size", "-1", "7"]
    hyphens = [word.replace("_", "-") if word.startswith("--") else word for word in underscores]
    outputs = [subprocess.run([sys.executable, "-P", "-m", "fa3", "run", "--device", "cpu", *flags], check=True,
                              cwd=tmp_path, capture_output=True, text=True).stdout for flags in (underscores, hyphens)]
    assert outputs[0] == outputs[1]
    assert "check     ok" in outputs[0]


def test_a_wrong_answer_exits_1(monkeypatch, capsys):
    from fa3 import _numpy

    forward = _numpy.forward

    def corrupted(q, k, v, out, lse, **options):
        forward(q, k, v, out, lse, **options)
        out[-1, -1, 3] += out.dtype.type(0.25)

    monkeypatch.setattr(_numpy, "forward", corrupted)
    assert run(FEW) == cli.WRONG == 1
    assert "check     WRONG: query" in capsys.readouterr().out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number_anywhere_exits_1(monkeypatch, capsys, value):
    from fa3 import _numpy

    forward = _numpy.forward

    def corrupted(q, k, v, out, lse, **options):
        forward(q, k, v, out, lse, **options)
        out[5, 1, 0] = value

    monkeypatch.setattr(_numpy, "forward", corrupted)
    assert run(FEW) == 1
    assert "row 5 of head 1 is not finite" in capsys.readouterr().out


def test_a_wrong_lse_exits_1(monkeypatch, capsys):
    from fa3 import _numpy

    forward = _numpy.forward

    def corrupted(q, k, v, out, lse, **options):
        forward(q, k, v, out, lse, **options)
        lse[0, 0] += 0.01

    monkeypatch.setattr(_numpy, "forward", corrupted)
    assert run(FEW + " --return_lse") == 1
    assert "lse of sequence 0 is off" in capsys.readouterr().out


@pytest.mark.parametrize(("index", "name"), [(6, "dq of query"), (7, "dk of key"), (8, "dv of key"), (9, "dsinks of")])
def test_a_wrong_gradient_exits_1(monkeypatch, capsys, index, name):
    from fa3 import _numpy_backward

    backward = _numpy_backward.backward

    def corrupted(*arrays, **options):
        backward(*arrays, **options)
        arrays[index][(-1,) * arrays[index].ndim] += arrays[index].dtype.type(0.1)

    monkeypatch.setattr(_numpy_backward, "backward", corrupted)
    assert run(f"{FEW} --backward --sinks") == cli.WRONG
    out = capsys.readouterr().out
    assert "check     ok" in out and f"gradients WRONG: {name}" in out


@pytest.mark.parametrize(("value", "words"), [(np.nan, "is not finite"), (1, "is in no use, and not 0")])
def test_gradients_of_rows_in_no_use_exit_1(monkeypatch, capsys, value, words):
    from fa3 import _numpy_backward

    backward = _numpy_backward.backward

    def corrupted(*arrays, **options):
        backward(*arrays, **options)
        first_end, allocated = int(options["seqused_k"][0]), int(options["cu_seqlens_k"][1])
        assert first_end < allocated
        arrays[7][first_end, 0, 0] = value

    monkeypatch.setattr(_numpy_backward, "backward", corrupted)
    assert run(f"{FEW} --backward --seqused_k") == 1
    assert words in capsys.readouterr().out


def test_a_wrong_mask_exits_1(monkeypatch, capsys):
    """The check has its own Philox: a seed that the library takes for another shows."""
    from fa3 import _philox

    philox = _philox.philox4x32
    monkeypatch.setattr(_philox, "philox4x32", lambda counter, seed: philox(counter, seed ^ 1))
    assert run(f"{FEW} --dropout_p 0.2") == 1
    assert "check     WRONG" in capsys.readouterr().out


def test_a_small_budget_checks_gradients_on_a_sample():
    from fa3 import _numpy_backward
    from fa3._gradient_check import check_backward

    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((64, 2, 32)).astype(np.float16) for _ in range(4))
    out, lse = np.zeros_like(q), np.zeros((2, 64), np.float32)
    cu_seqlens = np.array([0, 64])
    keywords = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, batch=1, max_seqlen_q=64, max_seqlen_k=64,
                    softmax_scale=0.2, causal=False, window_left=-1, window_right=-1, attention_chunk=0, softcap=0.0)
    _numpy.forward(q, k, v, out, lse, num_splits=0, batch_invariant=False, pack_gqa=None, sm_margin=0, **keywords)
    gradients = [np.empty_like(x) for x in (q, k, v)]
    _numpy_backward.backward(dout, q, k, v, out, lse, *gradients, None, **keywords)
    packed = check.Packed(np.array([0]), np.array([64]), np.array([0]), np.array([64]))
    inputs = dout, out, lse, q, k, v, packed, check.Formula(0.2)
    report = check_backward(gradients, *inputs, budget=200_000)
    assert report.ok and 8 <= report.rows_checked < report.rows_total == 384
    for i in range(3):
        for row in (0, -1):
            wrong = [x.copy() for x in gradients]
            wrong[i][row] += np.float16(0.1)
            assert not check_backward(wrong, *inputs, budget=200_000).ok


@pytest.mark.parametrize(("flags", "words"), [
    ("--dropout_p 1", "ValueError: dropout_p"),
    ("--backward --fp8", "TypeError: q: dtype float8_e4m3fn, needs float16"),
    ("--backward --qv", "ValueError: --backward: given with --qv"),
    ("--backward --page_size 8", "ValueError: --backward: given with --page_size"),
    ("--num_heads_k 3", "ValueError: "),
    ("--softcap -1", "ValueError: softcap"),
    ("--seqlens 3,x", "ValueError: --seqlens"),
    ("--seqlens_file no-such-file.json", "FileNotFoundError: "),
    ("--q_descale 1", "ValueError: q_descale"),
    ("--num_heads 0", "ValueError: --num_heads: 0, needs at least 1"),
    ("--num_heads_k 0", "ValueError: --num_heads_k: 0, needs at least 1"),
    ("--head_size 0", "ValueError: --head_size: 0, needs at least 1"),
    ("--head_size_v 0", "ValueError: --head_size_v: 0, needs at least 1"),
    ("--seqlens_k 3", "ValueError: --seqlens_k: given without --seqlens or --seqlens_file"),
    ("--seqlens 3 --seqlens_k 3,4", "ValueError: --seqlens_k: 2 lengths, but the queries have 1"),
    ("--seqlens 3 --seqlens_file no-such-file.json", "ValueError: --seqlens: given with --seqlens_file"),
    ("--deterministic", "ValueError: --deterministic: given without --backward"),
    ("--fp8_accumulate 64", "ValueError: fp8_accumulate: 64, needs None with q of dtype float16"),
])
def test_refusals_exit_2_with_one_line(flags, words, capsys):
    assert run(f"{FEW} {flags}") == cli.ERROR == 2
    error = capsys.readouterr().err
    assert error.startswith("fa3 run: ") and words in error
    assert error.count("\n") == 1


def test_the_problem_is_printed_before_it_is_computed(monkeypatch, capsys):
    def interrupted(*arrays, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(_numpy, "forward", interrupted)
    assert run(FEW) == cli.INTERRUPTED
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["problem", "device"]


@pytest.mark.parametrize("flags", ["--batch_size -1", "--no_such_flag", "--fp8 --fp16", "--window_size 1"])
def test_unknown_flags_exit_2(flags):
    with pytest.raises(SystemExit) as exit_:
        run(flags)
    assert exit_.value.code == 2


def test_lengths_from_a_file(tmp_path, capsys):
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps({"cu_seqlens": [0, 64, 112, 112, 176]}))
    assert run(f"--seqlens_file {path} --num_heads 2 --head_size 32 --no_time") == 0
    assert "batch_size 4, seqlen_q 0…64 (176 tokens)" in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, {"lengths": [0, 3]}, {"cu_seqlens": "0"}, {"cu_seqlens": None}, [], [1, 2],
                                     [0, 3, 2], [0, 1.5], [0, None], [[0, 1]], 3, [0, True]])
def test_a_file_without_lengths(tmp_path, capsys, content):
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(content))
    assert run(f"--seqlens_file {path}") == cli.ERROR
    assert "ValueError: --seqlens_file: " in capsys.readouterr().err


def test_deterministic_goes_to_the_backward(monkeypatch, capsys):
    seen, backward = [], fa3.flash_attn_varlen_backward

    def watched(*arrays, **options):
        seen.append(options.get("deterministic"))
        return backward(*arrays, **options)

    monkeypatch.setattr(fa3, "flash_attn_varlen_backward", watched)
    assert run(f"{FEW} --backward --deterministic") == run(f"{FEW} --backward") == 0
    assert seen == [True, None]
    assert "deterministic, backward" in capsys.readouterr().out.splitlines()[0]


def test_parse_seqlens():
    assert parse_seqlens("64x2, 48,1x3").tolist() == [64, 64, 48, 1, 1, 1]


@pytest.mark.parametrize("flags", ["--batch_size 0", "--max_seqlen_q 0 --max_seqlen_k 5", "--max_seqlen_q 5 "
                                   "--max_seqlen_k 0"])
@pytest.mark.parametrize("more", ["--return_lse", "--backward --sinks"])
def test_nothing_to_compute(flags, more):
    assert run(f"--num_heads 2 --head_size 32 {flags} {more}") == 0


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("fa3 ", "library", "include", "CUDA runtime", "CUDA driver", "devices", "NumPy", "CPU"):
        assert word in out
    for title, variants in (("forward kernels", _core.variants()), ("backward kernels", _core.backward_variants())):
        table = out.partition(f"{title}\n")[2].splitlines()
        assert [line.split()[0] for line in table[1:1 + len(variants)]] == [variant["name"] for variant in variants]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fa3 {fa3.__version__}\n"


def test_info_loads_no_framework(tmp_path):
    code = ("import sys; from fa3.cli import main; main(['info']); "
            "assert not {'torch', 'cupy', 'jax', 'numba'} & set(sys.modules)")
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("masking", [
    check.Masking(), check.Masking(causal=True), check.Masking(window_left=3, window_right=1),
    check.Masking(causal=True, window_left=2), check.Masking(attention_chunk=4),
    check.Masking(causal=True, attention_chunk=3), check.Masking(window_right=0),
])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 9), (7, 7), (9, 4), (5, 11), (3, 0), (0, 3)])
def test_the_check_sees_what_the_rule_says(masking, seqlen_q, seqlen_k):
    """The key range against the rule, spelled out pair by pair."""
    first, end = masking.key_range(np.arange(seqlen_q), seqlen_q, seqlen_k)
    pairs = 0
    for i in range(seqlen_q):
        p = i + seqlen_k - seqlen_q
        right = 0 if masking.causal else masking.window_right
        chunk = masking.attention_chunk
        visible = [j for j in range(seqlen_k)
                   if (right < 0 or j <= p + right) and (masking.window_left < 0 or j >= p - masking.window_left)
                   and (not chunk or p // chunk == j // chunk)]
        assert visible == list(range(first[i], end[i]))
        pairs += len(visible)
    assert masking.visible_pairs(seqlen_q, seqlen_k) == pairs


def _problem(rng, dtype, rows=64, heads=2, head_dim=32):
    q, k, v = (rng.standard_normal((rows, heads, head_dim)).astype(dtype) for _ in range(3))
    s = np.einsum("ihd,jhd->hij", q.astype(float), k.astype(float)) / np.sqrt(head_dim)
    p = np.exp(s - s.max(-1, keepdims=True))
    out = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v.astype(float))
    packed = check.Packed(np.array([0]), np.array([rows]), np.array([0]), np.array([rows]))
    return out, (q, k, v, packed, check.Formula(head_dim ** -0.5))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_check_accepts_rounding_and_no_more(dtype):
    out, problem = _problem(np.random.default_rng(0), dtype)
    exact = check.check_forward(out.astype(dtype), None, *problem)
    assert exact.ok and exact.rows_checked == exact.rows_total == 128 and exact.share < 1
    eps = float(ml_dtypes.finfo(dtype).eps)
    report = check.check_forward((out * (1 + 20 * eps)).astype(dtype), None, *problem)
    assert not report.ok and report.share > 1


def test_the_check_allows_fp8_what_tensor_cores_drop_of_each_product():
    """Of an lse the share of qv · v counts too: all of the score, where k is 0."""
    rng = np.random.default_rng(0)
    q, qv, v = (rng.standard_normal((8, 1, 32)).astype(ml_dtypes.float8_e4m3fn) for _ in range(3))
    rows = check.Packed(*(np.array([n]) for n in (0, 8, 0, 8)))
    descales = {name: np.full((1, 1), 8, np.float32) for name in ("q_descale", "v_descale")}
    problem = q, np.zeros_like(q), v, rows, check.Formula(1.0, **descales)
    s = qv[:, 0].astype(float) @ v[:, 0].astype(float).T * 64
    p = np.exp(s - s.max(axis=1, keepdims=True))
    out = (p / p.sum(axis=1, keepdims=True) @ v[:, 0].astype(float) * 8)[:, None].astype(ml_dtypes.bfloat16)
    lse = (np.log(p.sum(axis=1)) + s.max(axis=1))[None]
    allowed = 2.0**-11 * 64 * (np.abs(qv[:, 0].astype(float)) @ np.abs(v[:, 0].astype(float)).T).max()
    assert check.check_forward(out, lse, *problem, qv=qv).ok
    assert check.check_forward(out, lse + allowed / 4, *problem, qv=qv).ok
    assert not check.check_forward(out, lse + 2 * allowed, *problem, qv=qv).ok


def test_a_small_budget_checks_a_sample_with_first_and_last():
    out, problem = _problem(np.random.default_rng(0), np.float16)
    out = out.astype(np.float16)
    report = check.check_forward(out, None, *problem, budget=20_000)
    assert report.ok and 4 <= report.rows_checked < report.rows_total
    for row in (0, -1):
        wrong = out.copy()
        wrong[row] += np.float16(0.1)
        assert not check.check_forward(wrong, None, *problem, budget=20_000).ok


class Screen:
    """A stream that is a terminal, or not."""

    def __init__(self, is_terminal):
        self.is_terminal, self.text = is_terminal, ""

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_drawn_and_wiped():
    screen = Screen(True)
    with Progress("checking", screen) as progress:
        progress(1, 2)
        progress(2, 2)
    assert "checking [" in screen.text and "2/2" in screen.text
    assert screen.text.endswith("\r") and not screen.text.split("\r")[-2].strip()


def test_progress_is_silent_in_a_pipe():
    screen = Screen(False)
    with Progress("checking", screen) as progress:
        progress(1, 1)
    assert not screen.text
