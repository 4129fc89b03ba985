"""Compile C and C++ at test time: what the library's headers promise is tested as their users would see it."""

import ctypes
import functools
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
HERE = Path(__file__).resolve().parent
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compile_with(compiler, output, sources, *flags):
    """Run gcc or g++; skips the test where the machine has none, and fails it with what the compiler said."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    done = subprocess.run([compiler, *WARNINGS, *sources, *flags, "-o", output],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@functools.cache
def sanitizer_flags():
    """Undefined behaviour is told on stderr as "runtime error: …", where g++ has the runtime for it; a warning, once,
    where it has not."""
    flags = ("-fsanitize=undefined",)
    probe = subprocess.run(["g++", *flags, "-shared", "-fPIC", "-x", "c++", "-", "-o", "/dev/null"],
                           input="int f(int a) { return a + 1; }", capture_output=True, text=True)
    if probe.returncode == 0:
        return flags
    warnings.warn("g++ has no runtime for -fsanitize=undefined: undefined behaviour is not looked for", stacklevel=2)
    return ()


def host_library(folder, name, sources, *flags, sanitize=True):
    """A shared library of the host-callable parts of src/, for ctypes; headers in the folders of `flags` go first."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = compile_with("g++", folder / f"lib{name}.so", sources, "-std=c++20", "-O1", "-g", "-shared", "-fPIC",
                           *flags, f"-I{SRC}", *(sanitizer_flags() if sanitize else ()))
    return ctypes.CDLL(str(library))
