"""The command line: ``fa3 run`` computes and checks one problem, ``fa3 info`` says what is here."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import sys

WRONG, ERROR, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141

_EPILOG = """\
Flags may be written with underscores or with hyphens.
Exit code: 0 the answer is right, 1 it is wrong, 2 the call was refused or could not run.

Examples:
  fa3 run --fp16 --batch_size 1 --max_seqlen_q 1285 --max_seqlen_k 1285 --num_heads 16 --num_heads_k 2 \\
          --head_size 80 --causal
  fa3 run --bf16 --seqlens 64x21,48x7,100 --num_heads 16 --head_size 128 --device cpu
"""

_FRAMEWORKS = (
    ("NumPy", ("numpy",)),
    ("ml_dtypes", ("ml_dtypes",)),
    ("PyTorch", ("torch",)),
    ("CuPy", ("cupy", "cupy-cuda13x", "cupy-cuda12x")),
    ("JAX", ("jax",)),
    ("Numba", ("numba",)),
    ("Numba CUDA", ("numba-cuda",)),
    ("RMM", ("rmm-cu13", "rmm-cu12", "rmm")),
)


def main(argv=None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args([_underscored(word) for word in (sys.argv[1:] if argv is None else argv)])
    try:
        code = args.function(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output, as `head`, has enough; Python's last flush must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except KeyboardInterrupt:
        print(f"fa3 {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ArithmeticError, BufferError, ImportError, MemoryError, NotImplementedError, OSError, RuntimeError,
            TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        print(f"fa3 {args.command}: {type(error).__name__}: {message}", file=sys.stderr)
        return ERROR


def run(args) -> int:
    """``fa3 run``: make a problem, compute it, check it, time it; with ``--backward`` its gradients."""
    from ._progress import Progress
    from ._reference_check import check_forward
    from ._run_device import choose_device
    from ._run_problem import make_problem

    device = choose_device(args.device)
    problem = make_problem(args)
    # First of all, for whoever waits for a large problem on the CPU.
    print(f"problem   {problem.describe()}" + (", backward" if args.backward else ""))
    print(f"device    {device.name}", flush=True)
    call = problem.call(device, **({"return_lse": True} if args.backward else {}))
    result = call()
    out, lse = (device.get(x) for x in result) if args.return_lse or args.backward else (device.get(result), None)
    with Progress("checking") as progress:
        report = check_forward(out, lse, problem.q, problem.k, problem.v, problem.packed, problem.formula,
                               qv=problem.qv, seed=args.seed, progress=progress)
    gradients = None
    if args.backward and report.ok:
        call, gradients = _backward(problem, device, result, out, lse, args.seed)
    if args.time:
        seconds, runs = device.median_seconds(call)
        flops, amount = problem.flops, problem.bytes_moved(out.dtype.itemsize)
        if gradients is not None:
            flops, amount = problem.backward_flops, problem.backward_bytes_moved()
        time = f"{seconds * 1e6:,.1f} µs" if seconds < 0.01 else f"{seconds * 1e3:,.1f} ms"
        print(f"time      {time} (median of {runs})")
        print(f"speed     {_digits(flops / seconds / 1e12)} TFLOP/s, {_digits(amount / seconds / 1e9)} GB/s")
    print(f"check     {report}")
    if gradients is not None:
        print(f"gradients {gradients}")
    return 0 if report.ok and (gradients is None or gradients.ok) else WRONG


def _backward(problem, device, result, out, lse, seed):
    """The call that computes gradients, and what the check found of them."""
    import numpy as np

    from ._gradient_check import check_backward
    from ._progress import Progress

    rng = np.random.default_rng([seed, 1])
    dout = rng.standard_normal(out.shape, dtype=np.float32).astype(out.dtype)
    call = problem.backward_call(device, dout, *result)
    gradients = [device.get(array) for array in call()]
    with Progress("checking gradients") as progress:
        report = check_backward(gradients, dout, out, lse, problem.q, problem.k, problem.v, problem.packed,
                                problem.formula, seed=seed, progress=progress)
    return call, report


def info(args) -> int:
    """``fa3 info``: versions, paths, devices, frameworks, kernels."""
    import fa3

    from . import _core

    build = _core.build_info()
    print(f"fa3           {fa3.__version__}")
    print(f"library       {fa3.get_library()}")
    print(f"include       {fa3.get_include()}")
    print(f"CUDA runtime  {_dotted(build['cuda_runtime'])}, linked in")
    print(f"CUDA driver   {_dotted(build['cuda_driver']) if build['cuda_driver'] else 'none'}")
    count = _core.device_count()
    print(f"devices       {count or 'none: calls run on the CPU'}")
    for index in range(count):
        device = _core.device_info(index)
        major, minor = device["compute_capability"]
        runs = "runs fa3's kernels" if (major, minor) == (9, 0) else "fa3's kernels need 9.0"
        print(f"  {index}: {device['name']}, compute capability {major}.{minor} ({runs}), "
              f"{device['num_sms']} SMs, {device['total_memory'] / 2**30:.0f} GiB")
    print("frameworks    " + ", ".join(_installed_frameworks()))
    for title, variants in (("forward", _core.variants()), ("backward", _core.backward_variants())):
        columns = tuple(variants[0]) if variants else ("none",)
        _print_table(f"{title} kernels", columns, [tuple(str(variant[c]) for c in columns) for variant in variants])
    return 0


def _installed_frameworks():
    """Name and version of each, from package metadata: importing them would take seconds."""
    for name, packages in _FRAMEWORKS:
        for package in packages:
            try:
                yield f"{name} {importlib.metadata.version(package)}"
                break
            except importlib.metadata.PackageNotFoundError:
                continue


def _dotted(version) -> str:
    return ".".join(map(str, version))


def _print_table(title, columns, rows):
    widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(f"{title}")
    for row in (columns, *rows):
        cells = (str(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())


def _digits(value: float) -> str:
    """Three digits at least, and no exponent: 0.0000709, 5.11, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{decimals}f}"


def _underscored(word: str) -> str:
    """``--batch-size=3`` as ``--batch_size=3``; values are left alone."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}, needs 0 or more")
    return value


def _parser():
    parser = argparse.ArgumentParser(prog="fa3", description="Exact attention on Hopper GPUs and on any CPU.")
    parser.add_argument("--version", action="version", version=f"fa3 {importlib.metadata.version('fa3')}")
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="versions, devices, frameworks and kernels")
    info_parser.set_defaults(function=info)
    run_parser = commands.add_parser(
        "run", help="compute one problem, check the answer, time it", allow_abbrev=False,
        description="Compute attention on random input, check it against float64, and time it.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_parser.set_defaults(function=run)
    _add_problem_flags(run_parser)
    _add_option_flags(run_parser)
    return parser


def _add_problem_flags(parser):
    group = parser.add_argument_group("the problem")
    dtypes = group.add_mutually_exclusive_group()
    for dtype, text in (("fp8", "float8_e4m3fn"), ("fp16", "float16 (the default)"), ("bf16", "bfloat16")):
        dtypes.add_argument(f"--{dtype}", dest="dtype", action="store_const", const=dtype, help=text)
    parser.set_defaults(dtype="fp16")
    add = group.add_argument
    add("--batch_size", type=_count, default=1, metavar="N", help="sequences (1)")
    add("--max_seqlen_q", type=_count, default=1024, metavar="N", help="longest sequence of queries (1024)")
    add("--max_seqlen_k", type=_count, metavar="N", help="longest sequence of keys (that of the queries)")
    add("--fixed", action="store_true", help="every sequence as long as the longest; else lengths are random, from 1 "
        "to the longest, which occurs; where both maxima are equal, a sequence has as many keys as queries")
    add("--seqlens", metavar="LIST", help="the lengths themselves, as 64x21,48x7,100; in place of the four above")
    add("--seqlens_k", metavar="LIST", help="other lengths for the keys")
    add("--seqlens_file", metavar="FILE", help='cumulative lengths: a JSON list, or {"cu_seqlens": list}')
    add("--num_heads", type=_count, default=16, metavar="N", help="heads of q (16)")
    add("--num_heads_k", type=_count, metavar="N", help="heads of k and v (those of q)")
    add("--head_size", type=_count, default=128, metavar="N", help="head dim of q and k (128)")
    add("--head_size_v", type=_count, metavar="N", help="head dim of v (that of q)")
    add("--seed", type=_count, default=0, metavar="N", help="seed of lengths and values (0)")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="auto: a GPU that fa3 runs on if there is one and CuPy or PyTorch is installed, else the CPU")
    add("--no_time", dest="time", action="store_false", help="check the answer only")


def _add_option_flags(parser):
    add = parser.add_argument_group("options of the call").add_argument
    add("--causal", action="store_true", help="query i sees keys up to its own position, aligned at the end")
    add("--softmax_scale", type=float, metavar="X", help="scale of the scores (default: 1/sqrt(head_size))")
    add("--window_size", type=int, nargs=2, default=(-1, -1), metavar=("LEFT", "RIGHT"), help="-1: no bound")
    add("--attention_chunk", type=_count, default=0, metavar="N", help="see only the own chunk of N keys")
    add("--softcap", type=float, default=0.0, metavar="X", help="scores become X·tanh(score/X)")
    add("--sinks", action="store_true", help="one random extra logit per head in the softmax")
    add("--qv", action="store_true", help="scores add qv·v")
    for name in ("q_descale", "k_descale", "v_descale"):
        add(f"--{name}", type=float, metavar="X", help="constant fp8 factor, of every sequence and head")
    add("--seqused_q", action="store_true", help="use a random part of each sequence's queries")
    add("--seqused_k", action="store_true", help="use a random part of each sequence's keys; the rest is NaN")
    add("--page_size", type=_count, default=0, metavar="N", help="keys and values in shuffled pages of N rows")
    add("--num_splits", type=_count, default=0, metavar="N", help="0: chosen, 1: none")
    add("--batch_invariant", action="store_true", help="bits do not depend on the rest of the batch")
    add("--pack_gqa", action="store_true", default=None, help="pack the query heads of a KV head (or --no_pack_gqa)")
    add("--no_pack_gqa", dest="pack_gqa", action="store_false", default=None, help=argparse.SUPPRESS)
    add("--sm_margin", type=_count, default=0, metavar="N", help="leave N multiprocessors free")
    add("--fp8_accumulate", type=_count, metavar="N", help="fp8 on the GPU: keys between sums in float32 (0: all)")
    add("--out_dtype", choices=("fp16", "bf16"), help="of the result (that of q; fp8: bf16)")
    add("--return_lse", action="store_true", help="ask for the log-sum-exp and check it too")
    add("--dropout_p", type=float, default=0.0, metavar="P", help="drop each probability with P")
    add("--dropout_seed", type=_count, metavar="N", help="seed of the dropout mask (default: --seed)")
    add("--backward", action="store_true", help="compute, check and time the gradients as well")
    add("--deterministic", action="store_true", help="with --backward: gradients that are bitwise repeatable")
