"""From PyTorch arrays on a GPU to libfa3's struct, on a stand-in for the GPU: see host_path.py for what is checked."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from compilers import HERE

sys.path.append(str(HERE.parent))  # bench is part of the checkout, not of the package; last: fa3 is installed

from bench import stand_in

SCRIPT = HERE / "host_path.py"
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What went wrong, by check; all in one process, which takes seconds to import PyTorch."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this PyTorch has no exchange API")
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    library = stand_in.build(tmp_path_factory.mktemp("stand_in"))
    done = subprocess.run([sys.executable, "-P", SCRIPT, library], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_host_path(outcomes, check):
    assert not outcomes[check], outcomes[check]


def test_the_stand_in_comes_before_fa3():
    import fa3  # noqa: F401

    with pytest.raises(RuntimeError, match="must be loaded before fa3"):
        stand_in.StandIn("nowhere")
