"""The build: what libfa3.so shows and needs, and the helper programs in src/ that Meson runs."""

import csv
import importlib.util
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import MINIMAL
from compilers import SRC

import fa3
from fa3 import _core

LIBRARY = Path(fa3.get_library())


def binutils(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run([*command, LIBRARY], capture_output=True, text=True, check=True).stdout


def test_only_the_interface_is_exported():
    exported = {line.split()[-1] for line in binutils("nm", "--dynamic", "--defined-only").splitlines()}
    declared = set(re.findall(r"^FA3_API .*?(fa3_\w+)\(", (SRC / "fa3.h").read_text(), re.MULTILINE))
    assert exported == declared


def test_cuda_is_not_linked():
    """libcuda comes with a driver, and libcudart with a toolkit: neither may be missed when the library is loaded."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", binutils("readelf", "--dynamic"))
    assert needed
    assert not [name for name in needed if "cuda" in name or "nvidia" in name]


def test_size():
    assert LIBRARY.stat().st_size <= 25 * 2**20


def test_installed_header():
    assert Path(fa3.get_include(), "fa3.h").read_bytes() == (SRC / "fa3.h").read_bytes()


def test_resources_are_those_of_the_variants():
    with open(SRC / "resources.csv", newline="") as file:
        rows = {row["kernel"]: row for row in csv.DictReader(file)}
    kernels = {v["name"]: v["shared_memory"] for v in _core.variants()}
    listed = {name: int(row["shared_memory"]) for name, row in rows.items() if name.startswith("forward_")}
    assert kernels.items() <= listed.items() if MINIMAL else kernels == listed
    for row in rows.values():
        spills = any(int(row[name]) for name in ("stack", "spill_stores", "spill_loads"))
        assert spills == bool(row["reason"]), f"{row['kernel']}: a measured reason goes with what spills"


LAYERS = ("arch", "tile", "attention", "kernels")
ANY_LAYER = ("fa3.h", "wgmma_shapes.h")  # the interface's numbers, and what the build writes


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_includes_only_those_below_it(layer):
    """arch <- tile <- attention <- kernels <- the rest."""
    below = LAYERS[:LAYERS.index(layer) + 1]
    files = sorted((SRC / layer).iterdir())
    assert files
    for file in files:
        for included in re.findall(r'^#include "(.*)"', file.read_text(), re.MULTILINE):
            folder = included.partition("/")[0]
            assert folder in below or included in ANY_LAYER, f"{file.relative_to(SRC)} includes {included}"


def run_helper(name, *arguments, python_flags=(), **options):
    return subprocess.run([sys.executable, *python_flags, SRC / name, *map(str, arguments)], capture_output=True,
                          text=True, **options)


def load_helper(name):
    spec = importlib.util.spec_from_file_location(name, SRC / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# compile_kernel.py, with a compiler that writes the object and says what it is told to.

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 7 barriers
"""
CLEAN = {"stack": 0, "stores": 0, "loads": 0, "registers": 168}
SPILLED = {"stack": 16, "stores": 24, "loads": 32, "registers": 168}
HEADER = "kernel,registers,stack,spill_stores,spill_loads,shared_memory,reason\n"


@pytest.fixture
def compile_kernel(tmp_path):
    """Runs `compile_kernel.py compile` on a made-up compiler's report."""
    def run(report, table=HEADER, exit_code=0):
        (tmp_path / "table.csv").write_text(table)
        fake = f"import sys; open(sys.argv[1], 'w'); sys.stderr.write({report!r}); sys.exit({exit_code})"
        target = tmp_path / "some_kernel.o"
        done = run_helper("compile_kernel.py", "compile", tmp_path / "table.csv", target, sys.executable, "-c", fake,
                          target)
        resources = Path(f"{target}.resources")
        done.resources = resources.read_text() if resources.exists() else None
        return done
    return run


def test_a_clean_kernel(compile_kernel):
    done = compile_kernel("note: said by nvcc\n" + PTXAS.format(**CLEAN))
    assert (done.returncode, done.resources) == (0, "some_kernel,168,0,0,0\n")
    assert done.stderr == "note: said by nvcc\n", "what ptxas measured is not repeated, what nvcc says is"


@pytest.mark.parametrize("code", ["C7508", "C7510", "C7511", "C7512", "C7514"])
def test_a_weakened_kernel(compile_kernel, code):
    done = compile_kernel(f"ptxas info    : (C{code[1:]}) Potential Performance Loss: wgmma serialised\n"
                          + PTXAS.format(**CLEAN))
    assert done.returncode == 1
    assert done.resources is None
    assert "some_kernel" in done.stderr and code in done.stderr


@pytest.mark.parametrize("fault", [{"stack": 8}, {"stores": 4}, {"loads": 4}], ids=str)
def test_an_unlisted_spill(compile_kernel, fault):
    done = compile_kernel(PTXAS.format(**CLEAN | fault))
    assert (done.returncode, done.resources) == (1, None)
    assert "table.csv" in done.stderr


def test_a_listed_spill(compile_kernel):
    table = HEADER + "some_kernel,168,16,24,32,0,measured: the other way is slower\n"
    done = compile_kernel(PTXAS.format(**SPILLED), table)
    assert (done.returncode, done.resources) == (0, "some_kernel,168,16,24,32\n")
    assert compile_kernel(PTXAS.format(**SPILLED | {"loads": 36}), table).returncode == 1, "more than is listed"
    assert compile_kernel(PTXAS.format(**SPILLED), table.replace("some_", "other_")).returncode == 1


def test_a_spill_of_any_function(compile_kernel):
    """A device function that was not inlined is reported before the kernel, and its spills cost as much."""
    helper = PTXAS.format(**SPILLED).replace("'kernel'", "'helper'")
    assert compile_kernel(helper + PTXAS.format(**CLEAN)).returncode == 1


def test_each_tile_of_a_file_has_a_line(compile_kernel):
    """Under the name of its variant. Its plain kernel is in there, if it has one."""
    plain = "INS_11PlainTraitsINS_13ForwardTraitsINS_8BFloat16ELi80ELi80ELi1ELi64ELb0ELb0EEEEELb0EEEvNT_4ArgsE"
    names = {plain: "forward_bf16_d80x80_1x64", plain.replace("INS_11PlainTraits", ""): "forward_bf16_d80x80_1x64",
             "INS_13ForwardTraitsINS_10Float8E4M3ELi64ELi512ELi2ELi64ELb1ELb0EEELb0EEEvNT_4ArgsE":
             "forward_e4m3_d64x512_qv_2x64",
             "INS_13ForwardTraitsINS_10Float8E4M3ELi256ELi256ELi2ELi128ELb0ELb1EEELb0EEEvNT_4ArgsE":
             "forward_e4m3_d256x256_turned_2x128",
             "INS_14BackwardTraitsINS_7Float16ELi128ELi128ELi64ELi128EEELb1EEEvNS_12BackwardArgsE":
             "backward_fp16_d128x128_64x128"}
    reports = [PTXAS.format(**CLEAN | {"registers": 100 + i}).replace("'kernel'", f"'_ZN3fa36kernel{entry}'")
               for i, entry in enumerate(names)]
    lines = compile_kernel("".join(reports)).resources.splitlines()
    assert [line.split(",")[0] for line in lines] == list(dict.fromkeys(names.values()))
    assert [line.split(",")[1] for line in lines] == ["101", "102", "103", "104"], "the worst of a tile's"


def test_a_spill_of_one_tile_of_a_file(compile_kernel):
    entry = "_ZN3fa314forward_kernelINS_13ForwardTraitsINS_7Float16ELi64ELi64ELi{}ELi{}EEELb0EEEvNT_4ArgsE"
    one, three = (PTXAS.replace("'kernel'", f"'{entry.format(*tile)}'") for tile in ((1, 64), (3, 128)))
    name = "forward_fp16_d64x64"
    done = compile_kernel(one.format(**CLEAN) + three.format(**CLEAN | {"registers": 128}))
    assert (done.returncode, done.resources) == (0, f"{name}_1x64,168,0,0,0\n{name}_3x128,128,0,0,0\n")
    spilling = one.format(**CLEAN) + three.format(**SPILLED)
    assert compile_kernel(spilling, HEADER + f"{name}_1x64,168,16,24,32,0,of another\n").returncode == 1
    done = compile_kernel(spilling, HEADER + f"{name}_3x128,168,16,24,32,0,a reason\n")
    assert (done.returncode, done.resources) == (0, f"{name}_1x64,168,0,0,0\n{name}_3x128,168,16,24,32\n")


def test_each_kernel_of_quantisation_has_a_line(compile_kernel):
    """Of all dtypes together: the worst of them."""
    entries = {"QuantizeTraitsIfLb0ELi2ELi1EEEEEv": 64, "QuantizeTraitsINS_8BFloat16ELb0ELi2ELi1EEEEEv": 63,
               "QuantizeTraitsINS_7Float16ELb1ELi1ELi4EEEEEv": 142, "RotationTraitsINS_7Float16ELi128EEEEEv": 123,
               "22quantize_stream_kernelINS_14QuantizeTraitsINS_7Float16ELb0ELi1ELi4EEEEEv": 96}
    reports = [PTXAS.format(**CLEAN | {"registers": registers}).replace("'kernel'", f"'_ZN3fa38quantizeINS_{name}'")
               for name, registers in entries.items()]
    done = compile_kernel("".join(reports))
    assert done.resources.splitlines() == ["some_kernel_2x1,64,0,0,0", "some_kernel_hadamard_1x4,142,0,0,0",
                                           "some_kernel_128,123,0,0,0", "some_kernel_stream_1x4,96,0,0,0"]


def test_a_compiler_that_fails(compile_kernel):
    done = compile_kernel("kernel.cu(3): error: a shared array of 300000 bytes is too large\n", exit_code=2)
    assert (done.returncode, done.resources) == (2, None)
    assert "too large" in done.stderr, "whatever the words of an error are"


def test_table_is_checked_and_updated(tmp_path):
    variant = _core.variants()[0]  # shared memory is known for what is installed, not for other kernels
    (tmp_path / "build").mkdir()
    for kernel in (variant["name"], "copy_rows"):
        (tmp_path / "build" / f"{kernel}.o.resources").write_text(f"{kernel},168,0,0,0\n")
    table = tmp_path / "table.csv"
    table.write_text(HEADER + "copy_rows,168,0,0,0,0,a reason\n")
    check = "check", table, tmp_path / "build"
    done = run_helper("compile_kernel.py", *check)
    assert done.returncode == 1 and "update" in done.stderr
    assert run_helper("compile_kernel.py", "update", *check[1:]).returncode == 0
    assert table.read_text() == HEADER + ("copy_rows,168,0,0,0,0,a reason\n"
                                          f"{variant['name']},168,0,0,0,{variant['shared_memory']},\n")
    assert run_helper("compile_kernel.py", *check).returncode == 0
    (tmp_path / "nothing").mkdir()
    assert run_helper("compile_kernel.py", "check", table, tmp_path / "nothing").returncode != 0


# toolchain.py, with toolkits that hold nothing but what it looks for.

LAYOUTS = [("include", "lib64"), ("include", "lib"), ("targets/x86_64-linux/include", "targets/x86_64-linux/lib")]


def fake_toolkit(root, nvcc="bin/nvcc", include="include", lib="lib64"):
    for folder in (root / nvcc).parent, root / include, root / lib:
        folder.mkdir(parents=True, exist_ok=True)
    (root / include / "cuda.h").touch()
    (root / lib / "libcudart_static.a").touch()
    (root / nvcc).write_text(f"#!/bin/sh\necho '#$ TOP={root}/bin/..' >&2\n")
    (root / nvcc).chmod(0o755)
    return root / nvcc


def find_toolkit(folder, **environment):
    """The three lines that toolchain.py prints, or what it said. No site-packages: their wheels would be found."""
    environment = {"PATH": str(folder / "path"), **{name: str(value) for name, value in environment.items()}}
    done = run_helper("toolchain.py", python_flags=["-S"], env=environment)
    return done.stdout.splitlines() if done.returncode == 0 else done.stderr


def test_search_order(tmp_path):
    """$NVCC, then $CUDA_HOME, $CUDA_PATH, $CUDA_ROOT, then PyPI's wheels on sys.path, then PATH."""
    named = {variable: tmp_path / variable for variable in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT")}
    wheels, path = tmp_path / "site" / "nvidia" / "cu13", tmp_path / "path"
    environment = {"NVCC": fake_toolkit(tmp_path / "NVCC"), **named, "PYTHONPATH": tmp_path / "site"}
    for root in named.values():
        fake_toolkit(root)
    fake_toolkit(wheels, lib="lib")
    fake_toolkit(path, nvcc="nvcc")
    for variable, expected in [("NVCC", tmp_path / "NVCC" / "bin" / "nvcc"),
                               *((variable, root / "bin" / "nvcc") for variable, root in named.items()),
                               ("PYTHONPATH", wheels / "bin" / "nvcc"), (None, path / "nvcc")]:
        assert find_toolkit(tmp_path, **environment)[0] == str(expected)
        environment.pop(variable, None)
    assert list(load_helper("toolchain").candidates())[-1][0] == Path("/usr/local/cuda/bin/nvcc")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(tmp_path, layout):
    nvcc = fake_toolkit(tmp_path / "toolkit", include=layout[0], lib=layout[1])
    expected = [nvcc, *(tmp_path / "toolkit" / folder for folder in layout)]
    assert find_toolkit(tmp_path, CUDA_HOME=tmp_path / "toolkit") == list(map(str, expected))


def test_a_link_to_nvcc(tmp_path):
    """The toolkit is where nvcc itself says, not beside the link."""
    nvcc = fake_toolkit(tmp_path / "toolkit")
    (tmp_path / "link").symlink_to(nvcc)
    assert find_toolkit(tmp_path, NVCC=tmp_path / "link")[1] == str(tmp_path / "toolkit" / "include")


@pytest.mark.parametrize("variable", ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"])
def test_a_named_toolkit_that_is_not_there(tmp_path, variable):
    """What the user names is not silently replaced by another."""
    fake_toolkit(tmp_path / "path", nvcc="nvcc")
    said = find_toolkit(tmp_path, **{variable: tmp_path / "nowhere"})
    assert f"${variable} is set, but there is no {tmp_path / 'nowhere'}" in said


def test_a_toolkit_without_its_library(tmp_path):
    nvcc = fake_toolkit(tmp_path / "toolkit")
    (tmp_path / "toolkit" / "lib64" / "libcudart_static.a").unlink()
    assert "lacks cuda.h or libcudart_static.a" in find_toolkit(tmp_path, NVCC=nvcc)


def test_something_that_is_no_nvcc(tmp_path):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "nvcc").chmod(stat.S_IRWXU)
    assert "does not behave like nvcc" in find_toolkit(tmp_path, NVCC=tmp_path / "nvcc")


def test_no_toolkit_at_all(monkeypatch):
    toolchain = load_helper("toolchain")
    monkeypatch.setattr(toolchain, "candidates", lambda: iter([(Path("/nowhere/nvcc"), "PATH", False)]))
    with pytest.raises(SystemExit, match="install cuda-toolkit"):
        toolchain.main()


# gen_wgmma.py


def operands(text):
    """(constraint, expression) of an asm statement's operands, as %0, %1, … count them."""
    return re.findall(r'"(\+?\w)"\(([^()]*)\)', text)


@pytest.mark.parametrize(("shape", "element", "n"), [("bf16:ss:80", "BFloat16", 80), ("f16:rs:64", "Float16", 64),
                                                     ("f16:ss:256", "Float16", 256), ("bf16:rs:8", "BFloat16", 8)])
def test_wgmma_wrapper(shape, element, n):
    dtype, kind, _ = shape.split(":")
    text = load_helper("gen_wgmma").wrapper(shape)
    assert f"struct Wgmma{kind.upper()}<{element}, {n}>" in text
    assert f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} " in text
    found = operands(text)
    assert found[:n // 2] == [("+f", f"d[{i}]") for i in range(n // 2)], "64 x N floats among 128 threads"
    a = [("l", "a")] if kind == "ss" else [("r", f"a[{i}]") for i in range(4)]
    assert found[n // 2:] == [*a, ("l", "b"), ("r", "accumulate")]
    code = re.search(r'asm volatile\((.*?)\n *: "', text, re.DOTALL)[1]
    used = [int(number) for number in re.findall(r"%(\d+)", code)]
    predicate, *rest = used
    assert predicate == len(found) - 1
    assert rest == list(range(len(found) - 1)), "d, a, b in the order of the operands"
    flags = re.search(r"p, ([\d, ]+);", code)[1]
    assert flags == ("1, 1, 0, 0" if kind == "ss" else "1, 1, 1"), "b is K-major for ss, MN-major for rs"


def test_wgmma_shapes_are_written_once(tmp_path):
    done = run_helper("gen_wgmma.py", tmp_path / "shapes.h", "bf16:ss:80", "f16:rs:64", "bf16:ss:80")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "shapes.h").read_text()
    assert text.count("template <> struct") == 2
    assert text.count("{") == text.count("}")
