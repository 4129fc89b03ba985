"""What the plan chooses for a few calls that matter, as a table: tests/plan_choices.csv, which test_plan.py compares.

A change to src/plan_estimate.cpp's constants changes the table. With all kernels built, `python tests/plan_choices.py`
writes it anew; the difference belongs into the commit, beside what was measured.
"""

import csv
import io
import sys
from pathlib import Path

FILE = Path(__file__).with_name("plan_choices.csv")
NUM_SMS = 132
COLUMNS = ("tile_m", "tile_n", "pack_gqa", "num_splits", "whole_tiles", "grid", "cluster", "paired", "plain",
           "decode", "dynamic", "heads_per_section", "short_m_blocks", "workspace")


def call(dtype, batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, **more):
    return dict(dtype=dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=heads, num_heads_kv=heads_kv,
                head_dim=head_dim, head_dim_v=more.pop("head_dim_v", head_dim), num_sms=NUM_SMS, **more)


def ragged(dtype, batch, seqlen, heads, heads_kv, head_dim, **more):
    return call(dtype, batch, batch * seqlen, batch * seqlen, heads, heads_kv, head_dim, ragged=True, **more)


def cached(dtype, batch, seqlen_k, **more):
    """A step of decoding, of lengths that the host does not know."""
    return call(dtype, batch, 1, seqlen_k, 64, 8, 128, seqused_k=True, **more)


def latent(batch, seqlen_q, seqlen_k, heads, **more):
    return call("bfloat16", batch, seqlen_q, seqlen_k, heads, 1, 64, head_dim_v=512, has_qv=True, **more)


CALLS = {
    # spec.md, section 6
    "b3 s1680 h16 d80": call("float16", 3, 1680, 1680, 16, 16, 80),
    "b84 s64 h16 d80": call("float16", 84, 64, 64, 16, 16, 80),
    "b84 s64 h16 d80 ragged": ragged("float16", 84, 64, 16, 16, 80),
    "b1 s1285 h16/2 d80 causal": call("float16", 1, 1285, 1285, 16, 2, 80, causal=True),
    "decode k2048 h16/2 d80 causal": call("float16", 1, 1, 2048, 16, 2, 80, causal=True),
    "decode b4 k2048 h16/2 d128": call("float16", 4, 1, 2048, 16, 2, 128),
    "b2 s512 h16 d64 causal": call("float16", 2, 512, 512, 16, 16, 64, causal=True),
    "b2 s512 h16 d128 causal": call("float16", 2, 512, 512, 16, 16, 128, causal=True),
    "b16 s512 h16 d128 causal": call("float16", 16, 512, 512, 16, 16, 128, causal=True),
    "b128 s128 h32 d64": call("float16", 128, 128, 128, 32, 32, 64),
    "fp8 b16 s1024 h16 d128 causal": call("float8_e4m3fn", 16, 1024, 1024, 16, 16, 128, causal=True),
    "b1 s2048 h8 d192 causal": call("float16", 1, 2048, 2048, 8, 8, 192, causal=True),
    "b2 s512 h16 d256 causal": call("float16", 2, 512, 512, 16, 16, 256, causal=True),
    "fp8 b3 s1680 h16 d80": call("float8_e4m3fn", 3, 1680, 1680, 16, 16, 80),
    "fp8 b84 s64 h16 d80": call("float8_e4m3fn", 84, 64, 64, 16, 16, 80),
    "fp8 b84 t5040 h16 d128 ragged": ragged("float8_e4m3fn", 84, 60, 16, 16, 128, max_seqlen_q=64, max_seqlen_k=64),
    "fp8 b4 s4096 h32 d64": call("float8_e4m3fn", 4, 4096, 4096, 32, 32, 64),
    "fp8 b4 s4096 h16 d128": call("float8_e4m3fn", 4, 4096, 4096, 16, 16, 128),
    "fp8 b4 s4096 h16 d128 causal": call("float8_e4m3fn", 4, 4096, 4096, 16, 16, 128, causal=True),
    "fp8 b4 s4096 h8 d256": call("float8_e4m3fn", 4, 4096, 4096, 8, 8, 256),
    "bf16 b4 s4096 h8 d256": call("bfloat16", 4, 4096, 4096, 8, 8, 256),
    "bf16 b1 s16384 h8 d256 causal": call("bfloat16", 1, 16384, 16384, 8, 8, 256, causal=True),
    "fp8 b1 s16384 h8 d256": call("float8_e4m3fn", 1, 16384, 16384, 8, 8, 256),
    # bfloat16 of head dim 128, which every build has
    "bf16 b84 s64 h16 d128": call("bfloat16", 84, 64, 64, 16, 16, 128),
    "bf16 b84 s64 h16 d128 ragged": ragged("bfloat16", 84, 64, 16, 16, 128),
    "bf16 b1 s1024 h16 d128": call("bfloat16", 1, 1024, 1024, 16, 16, 128),
    "bf16 b1 s16384 h16 d128": call("bfloat16", 1, 16384, 16384, 16, 16, 128),
    "bf16 b1 s16384 h16 d128 causal": call("bfloat16", 1, 16384, 16384, 16, 16, 128, causal=True),
    "bf16 b1 s16384 h16 d128 causal batch_invariant": call("bfloat16", 1, 16384, 16384, 16, 16, 128, causal=True,
                                                            batch_invariant=True),
    "bf16 b8 s4096 h16 d128 ragged": ragged("bfloat16", 8, 4096, 16, 16, 128),
    "bf16 decode b1 k65536 h32/8 d128": call("bfloat16", 1, 1, 65536, 32, 8, 128),
    "bf16 decode b64 k4096 h32/8 d128": call("bfloat16", 64, 1, 4096, 32, 8, 128),
    "bf16 decode b16 k4096 h64/8 d128": cached("bfloat16", 16, 4096),
    "bf16 decode b16 k4096 h64/8 d128 pages of 16": cached("bfloat16", 16, 4096, page_size=16),
    "bf16 decode b16 k4096 h64/8 d128 pages of 256": cached("bfloat16", 16, 4096, page_size=256),
    "bf16 decode b16 k4096 h64/8 d128 pages of 1": cached("bfloat16", 16, 4096, page_size=1),
    "bf16 decode b16 k32768 h64/8 d128 pages of 16": cached("bfloat16", 16, 32768, page_size=16),
    "bf16 decode b16 k32768 h64/8 d128 pages of 256": cached("bfloat16", 16, 32768, page_size=256),
    "bf16 decode b128 k8192 h64/8 d128 pages of 64": cached("bfloat16", 128, 8192, page_size=64),
    "fp8 decode b16 k4096 h64/8 d128": cached("float8_e4m3fn", 16, 4096),
    "bf16 decode b4 q4 k8192 h32/4 d128 causal": call("bfloat16", 4, 4, 8192, 32, 4, 128, causal=True),
    "bf16 b1 q64 k8192 h8 d128": call("bfloat16", 1, 64, 8192, 8, 8, 128),
    "bf16 mla decode b1 k32768 h16": latent(1, 1, 32768, 16),
    "bf16 mla decode b16 k4096 h64": latent(16, 1, 4096, 64),
    "bf16 mla decode b128 k8192 h128": latent(128, 1, 8192, 128),
    "bf16 mla b1 s4096 h16 causal": latent(1, 4096, 4096, 16, causal=True),
    "bf16 b1 s512 h8 d128": call("bfloat16", 1, 512, 512, 8, 8, 128),
    "b1 s1024 h8 d80 causal": call("float16", 1, 1024, 1024, 8, 8, 80, causal=True),
    "bf16 b1 q64 k4096 h16/2 d128": call("bfloat16", 1, 64, 4096, 16, 2, 128),
    "bf16 b1 s16384 h16 d128 window": call("bfloat16", 1, 16384, 16384, 16, 16, 128, window_left=1024, window_right=0),
    "bf16 b1 s8192 h16 d128 window": call("bfloat16", 1, 8192, 8192, 16, 16, 128, window_left=512, window_right=0),
}


def rows():
    """A row of text for each call whose head dims this build has kernels of."""
    from fa3 import _core

    built = {(v["dtype"], v["head_dim"], v["head_dim_v"]) for v in _core.variants()}
    for name, arguments in CALLS.items():
        if (arguments["dtype"], arguments["head_dim"], arguments["head_dim_v"]) in built:
            plan = _core.plan(**arguments)
            yield [name, *(str(plan[column]) for column in COLUMNS)]


def main():
    found = list(rows())
    if len(found) < len(CALLS):
        sys.exit("this build lacks kernels: the table needs all of them")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["call", *COLUMNS], *found])
    FILE.write_text(text.getvalue())


if __name__ == "__main__":
    main()
