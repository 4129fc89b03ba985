"""What conftest.py makes of a machine without a GPU: its tests are skipped, or fail where FA3_REQUIRE_GPU=1 asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(("required", "outcome"), [("1", "1 passed, 1 error"), ("0", "1 passed, 1 skipped"),
                                                   (None, "1 passed, 1 skipped")])
def test_gpu_tests_without_a_gpu(tmp_path, required, outcome):
    for name in ("conftest.py", "emulated.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    (tmp_path / "test_two.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_gpu():\n    assert False\n"
                                          "def test_cpu():\n    pass\n")
    chosen = ("FA3_REQUIRE_GPU", "FA3_EMULATED_GPU")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    if required is not None:
        environment["FA3_REQUIRE_GPU"] = required
    done = subprocess.run([sys.executable, "-P", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"], cwd=tmp_path,
                          env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith(outcome), done.stdout
    assert "needs a GPU of compute capability 9.0: no CUDA device" in done.stdout
