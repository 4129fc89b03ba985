"""The kernels without a GPU: tests of the GPU on an emulated one (emulated.py), and what the emulation notices.

A thread block's warps go on in an order that is drawn, and what the copy engine and the tensor cores do comes early or
late: a wait that is missing shows in the result, or nobody goes on.
"""

import os
import re
import shutil
import signal
import sys

import emulated
import pytest

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(bool(emulated.LIBRARY), reason="runs on the emulated GPU already"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulated GPU changes stacks as Linux has them"),
]

# What runs where: arguments of pytest, multiprocessors, and how many tests there are at least.
SUITES = {
    "attention": (["test_attention.py", "test_kvcache.py", "test_cache_update.py", "test_combine.py"], 8, 140),
    "backward": (["test_backward.py", "test_dropout.py", "test_training.py"], 8, 30),
    "latent": (["test_latent.py", "test_quantize.py"], 8, 40),
    "decode": (["test_gpu_decode.py", "-k", "test_long_pieces or (test_against_float64 and bf16_d64 and full-48) or "
                "(test_against_float64 and fp16_d128 and window-None)"], 132, 12),
    "faults": (["test_emulated_faults.py"], 8, 2),
    "lies": (["test_gpu_backward.py", "-k", "64-causal or 256-full-deterministic or no_sequences"], 8, 20),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this PyTorch has no exchange API")
    return emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("suite", SUITES)
def test_on_the_emulated_gpu(library, suite):
    arguments, num_sms, least = SUITES[suite]
    files = [f"tests/{name}" if name.endswith(".py") else name for name in arguments]
    selected = [] if "-k" in files else ["-k", "torch-emulated"]
    done = emulated.run_tests(library, *files, *selected, "--hypothesis-profile=few", num_sms=num_sms)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least


# Text of a kernel, what stands there instead, and what is then wrong.
SCORES_DONE = """        arch::wgmma_wait<0>();
        arch::wgmma_wrote(o);
        arch::wgmma_wrote(s);
"""
RELEASE = "        release_k();\n"
FAULTS = {
    "keys are not waited for": (
        "forward_mma.cuh", "{ shared_.k_full[k_ring_.stage()].wait(k_ring_.parity()); }", "{}"),
    "keys are given back before their product is done": (
        "forward_mma.cuh", SCORES_DONE + RELEASE, RELEASE + SCORES_DONE),
    "a place is filled before it is empty": (
        "forward_load.cuh", "    empty[ring.stage()].wait(ring.parity() ^ 1);", ""),
    "values past the end are not cleared": (
        "forward_mma.cuh", "if (rows >= kTileN || !(args_.keys", "if (true || rows >= kTileN || !(args_.keys"),
    "an arrival is missing": ("forward_traits.cuh", "k_empty[stage].init(kWarps);", "k_empty[stage].init(kWarps + 1);"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_notices(library, tmp_path, fault):
    name, line, instead = FAULTS[fault]
    shutil.copytree(emulated.SRC, tmp_path / "src")
    text = (tmp_path / "src" / "kernels" / name).read_text()
    assert text.count(line) == 1, "the kernel has changed: say the fault anew"
    (tmp_path / "src" / "kernels" / name).write_text(text.replace(line, instead))
    folder = tmp_path / "emulated"
    folder.mkdir()
    for made in library.parent.glob("*.o"):
        os.link(made, folder / made.name)
    wrong = emulated.build(folder, kernels=tmp_path / "src", only="forward_0.")
    done = emulated.run_tests(wrong, "tests/test_emulated_faults.py", "-x")
    assert done.returncode in (1, -signal.SIGSEGV, -signal.SIGABRT), done.stdout[-4000:]
