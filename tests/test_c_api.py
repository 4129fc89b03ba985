"""fa3.h and libfa3.so as a C program sees them: plain C11, no CUDA toolkit, the library that the package installs."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from compilers import HERE, compile_with

import fa3

PROGRAMS = HERE / "c_program"
SKIPPED = 77
CHECKS = re.findall(r'^    {"(\w+)", check_', (PROGRAMS / "forward.c").read_text(), re.MULTILINE)


def compile_c(folder, name):
    library = Path(fa3.get_library())
    return compile_with("gcc", folder / name, [PROGRAMS / f"{name}.c"], "-std=c11", "-pedantic",
                        f"-I{fa3.get_include()}", library, f"-Wl,-rpath,{library.parent}", "-lm", "-ldl", "-pthread")


def run(program, *arguments, **environment):
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})


@pytest.fixture(scope="module")
def forward(tmp_path_factory):
    return compile_c(tmp_path_factory.mktemp("c_program"), "forward")


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_gpu(forward, check):
    done = run(forward, check)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_check_is_run(forward):
    assert run(forward).stdout.split() == CHECKS
    assert len(CHECKS) >= 10


def test_devices_as_python_counts_them(forward):
    from fa3 import _core

    assert f"devices {_core.device_count()}" in run(forward, "devices").stdout


def test_a_hidden_device_is_no_error(forward):
    done = run(forward, "devices", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "devices 0" in done.stdout


def test_attention_on_a_gpu(tmp_path):
    done = run(compile_c(tmp_path, "attention"), FA3_LOG="plan")
    if done.returncode == SKIPPED:
        pytest.skip(f"needs a GPU of compute capability 9.0: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("fa3 forward: batch ") for line in lines), done.stderr
    for found in ("heads 6 on 2", "1 heads a tile", "3 heads a tile", "[2-9] splits after 0 tiles", "copies q 0 k 1"):
        assert any(re.search(found, line) for line in lines), f"no call with {found}"


def layout(folder, compiler, *flags):
    program = compile_with(compiler, folder / f"layout_{compiler}", flags, f"-I{fa3.get_include()}")
    return dict(line.rsplit(maxsplit=1) for line in run(program).stdout.splitlines())


def test_structs_are_the_same_in_c_and_c_plus_plus(tmp_path):
    """The library and Cython's modules are C++; that libfa3 has this header's sizes, its check of struct_size says."""
    source = PROGRAMS / "layout.c"
    in_c = layout(tmp_path, "gcc", "-std=c11", "-pedantic", source)
    assert in_c == layout(tmp_path, "g++", "-std=c++20", "-x", "c++", source)
    assert in_c["fa3_forward_params.struct_size"] == "0"


def test_layout_names_every_field(tmp_path):
    """A field that is added to fa3.h and to no list here would go unseen."""
    header = re.sub(r"/\*.*?\*/", "", Path(fa3.get_include(), "fa3.h").read_text(), flags=re.DOTALL)
    in_c = layout(tmp_path, "gcc", "-std=c11", PROGRAMS / "layout.c")
    structs = re.findall(r"typedef struct (\w+) {", header)
    assert len(structs) == 13
    for struct in structs:
        body = re.search(rf"typedef struct {struct} {{(.*?)}}", header, re.DOTALL)[1]
        fields = {word for line in body.split(";") for word in re.findall(r"\*?(\w+)(?:\[\d+\])?(?=,|$)", line.strip())}
        assert fields == {name.split(".")[1] for name in in_c if name.startswith(f"{struct}.")}
