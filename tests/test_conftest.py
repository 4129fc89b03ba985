"""What conftest.py makes of a machine without a GPU: its tests are skipped, or fail where FA3_REQUIRE_GPU=1 asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parent / "conftest.py").read_text()


@pytest.mark.parametrize(("required", "outcome"), [("1", "1 passed, 1 error"), ("0", "1 passed, 1 skipped"),
                                                   (None, "1 passed, 1 skipped")])
def test_gpu_tests_without_a_gpu(tmp_path, required, outcome):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_two.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_gpu():\n    assert False\n"
                                          "def test_cpu():\n    pass\n")
    environment = {name: value for name, value in os.environ.items() if name != "FA3_REQUIRE_GPU"}
    if required is not None:
        environment["FA3_REQUIRE_GPU"] = required
    done = subprocess.run([sys.executable, "-P", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"], cwd=tmp_path,
                          env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith(outcome), done.stdout
    assert "needs a GPU of compute capability 9.0: no CUDA device" in done.stdout
