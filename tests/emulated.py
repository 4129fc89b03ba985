"""libfa3 with an emulated GPU: its host code and its kernels, compiled by g++ over tests/host/gpu.

    python tests/emulated.py FOLDER      build it there
"""

import ast
import concurrent.futures
import ctypes
import os
import re
import subprocess
import sys
import types
from pathlib import Path

LIBRARY = os.environ.get("FA3_EMULATED_GPU")  # where one was built: tests of the GPU then run on it

TESTS = Path(__file__).resolve().parent
SRC = TESTS.parent / "src"
# Elements by their names in src/meson.build: as the table has them, and as C++ does.
ELEMENTS = {"bf16": ("FA3_BFLOAT16", "BFloat16"), "fp16": ("FA3_FLOAT16", "Float16"),
            "e4m3": ("FA3_FLOAT8_E4M3", "Float8E4M3")}
KINDS = {"qv": ", true", "turned": ", false, true"}  # template arguments behind those of the tile
VARIANTS_OF_FILE = 6
KERNELS = ("backward_rows", "combine", "copy_rows", "prepare", "turn_values")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-extern-tls-init",
         "-Wno-unknown-pragmas", f"-I{TESTS / 'host' / 'gpu'}")


def table(name):
    """A list of src/meson.build: the kernels that are compiled."""
    found = re.search(rf"^{name} = (\[.*?^\])", (SRC / "meson.build").read_text(), re.MULTILINE | re.DOTALL)
    return ast.literal_eval(found[1])


def forward_variants():
    """Every line of the forward's table, as C++."""
    for element, (dtype, cpp) in ELEMENTS.items():
        for dim, dim_v, consumers, tile_n, *kind in table("fp8_tiles" if element == "e4m3" else "forward_tiles"):
            rows = 64 * (1 if kind == ["qv"] else consumers)
            name = "_".join(("forward", element, f"d{dim}x{dim_v}", *kind, f"{rows}x{tile_n}"))
            extra = KINDS[kind[0]] if kind else ""
            yield f"FA3_FORWARD_VARIANT({name}, {dtype}, {cpp}, {dim}, {dim_v}, {consumers}, {tile_n}{extra})"


def backward_variants():
    """The backward's: (name, template arguments, dtype)."""
    for element in ("bf16", "fp16"):
        dtype, cpp = ELEMENTS[element]
        for tile in table("backward_tiles"):
            yield "backward_{}_d{}x{}_{}x{}".format(element, *tile), ", ".join(map(str, (cpp, *tile))), dtype


def sources(folder):
    """Write what Meson writes; every file to compile, those that take longest first."""
    written = []

    def write(name, text):
        (folder / name).write_text(text)
        written.append(folder / name)

    forward, backward = list(forward_variants()), list(backward_variants())
    template = (SRC / "kernels" / "forward.cu.in").read_text()
    for first in range(0, len(forward), VARIANTS_OF_FILE):
        some = "\n".join(forward[first:first + VARIANTS_OF_FILE])
        write(f"forward_{first}.cpp", template.replace("@VARIANTS@", some))
    template = (SRC / "kernels" / "backward.cu.in").read_text()
    for name, traits, dtype in backward:
        write(f"{name}.cpp", template.replace("@NAME@", name).replace("@TRAITS@", traits).replace("@DTYPE@", dtype))
    (folder / "forward_variants.h").write_text("\n".join(forward))
    (folder / "backward_variants.h").write_text("\n".join(f"FA3_BACKWARD_VARIANT({name})" for name, *_ in backward))
    host = [TESTS / "host" / "emulated_quantize.cpp", TESTS / "host" / "emulated.cpp", *sorted(SRC.glob("*.cpp"))]
    return [*written, *(SRC / "kernels" / f"{name}.cu" for name in KERNELS), *host,
            TESTS.parent / "bench" / "exchange.c"]


def build(folder, *, kernels=SRC, only=""):
    """Compile the library; its path. `kernels`: in place of src/, where the kernels of files whose names begin with
    `only` come from; the objects of all others are in the folder already."""
    folder = Path(folder)
    files = sources(folder)

    def compiled(source):
        target = folder / f"{source.stem}_{source.suffix[1:]}.o"
        if not source.name.startswith(only):
            return target
        device = ["-D__CUDACC__"] if source.suffix == ".cu" or source.parent in (folder, TESTS / "host") else []
        cpp = ["g++", *FLAGS, *device, f"-I{folder}", f"-I{kernels}", "-x", "c++"]
        language = ["gcc", "-fPIC"] if source.suffix == ".c" else cpp
        done = subprocess.run([*language, "-c", source, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}: {done.stderr[:6000]}"
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, files))
    library = folder / "libemulated.so"
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    return library


def run_tests(library, *arguments, num_sms=8):
    """Run tests of the GPU on the library, in a process of their own: the finished process."""
    environment = {**os.environ, "FA3_EMULATED_GPU": str(library), "FA3_EMULATED_SMS": str(num_sms)}
    return subprocess.run([sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
                          cwd=TESTS.parent, env=environment, capture_output=True, text=True)


def load():
    """Load the library in front of libfa3. All of PyTorch's tensors are on cuda:0 then, as far as fa3 can see."""
    sys.path.append(str(TESTS.parent))  # bench is part of the checkout; last: fa3 is installed
    import torch

    from bench import stand_in

    library = stand_in.load(LIBRARY)
    library.emulated_choose.argtypes = ctypes.c_int, ctypes.c_uint64, ctypes.c_int
    library.emulated_choose(2, int(os.environ.get("FA3_EMULATED_SEED", 0)), int(os.environ.get("FA3_EMULATED_SMS", 8)))
    torch.Tensor.__dlpack_c_exchange_api__ = stand_in.cuda_exchange(library)
    torch.Tensor.cuda = lambda tensor: tensor


class Torch:
    """PyTorch for tests that make arrays on "cuda": they get the CPU's, which fa3 takes for the GPU's."""

    cuda = types.SimpleNamespace(synchronize=lambda: None)

    def __getattr__(self, name):
        import torch

        found = getattr(torch, name)
        if (isinstance(found, type) and name != "Generator") or not callable(found):
            return found

        def on_cpu(*args, **options):
            if options.get("device") == "cuda":
                options["device"] = "cpu"
            return found(*("cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args), **options)

        return on_cpu


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(build(sys.argv[1]))
