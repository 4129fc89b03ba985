"""Calls in which faults of a kernel show; see test_emulated_gpu.py. They are right where there are none."""

import frameworks
import pytest
import strategies
from strategies import Problem
from test_attention import assert_right, pose

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("framework", frameworks.GPU[:1])
@pytest.mark.parametrize("rows", [70, 700])
def test_many_blocks(framework, rows):
    """Sequences that end within a block, with NaN behind them, in more blocks than there are places for; of one
    warpgroup and of three."""
    problem = Problem(seqlens_q=(rows, 1), seqlens_k=(1000, 500), num_heads_kv=1, ratio=2, head_dim=32, head_dim_v=32,
                      dtype="bfloat16", varlen=True, padding_k=30, num_splits=1, pack_gqa=False)
    arrays = strategies.make(problem)
    for _ in range(3):  # each time another order is drawn
        out, lse = (framework.numpy(x) for x in pose(framework, problem, arrays, return_lse=True))
        assert_right(problem, arrays, out, lse)
