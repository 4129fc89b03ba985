"""Find nvcc and its libraries for Meson.

Prints three lines: the nvcc to run, the folder of its headers, the folder of libcudart_static.a. A toolkit that the
user names ($NVCC, $CUDA_HOME, $CUDA_PATH, $CUDA_ROOT) wins; then the one that PyPI's wheels put into the build
environment; then PATH and the usual place.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def candidates():
    """Every place to look, best first: (path, what named it, whether it must exist)."""
    if nvcc := os.environ.get("NVCC"):
        yield Path(shutil.which(nvcc) or nvcc), "$NVCC", True
    for variable in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"):
        if root := os.environ.get(variable):
            yield Path(root, "bin", "nvcc"), f"${variable}", True
    for folder in sys.path:
        yield Path(folder or ".", "nvidia", "cu13", "bin", "nvcc"), "PyPI's wheels", False
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc), "PATH", False
    yield Path("/usr/local/cuda/bin/nvcc"), "the usual place", False


def toolkit_root(nvcc):
    """The toolkit's folder, as nvcc itself gives it: the program found may be a link or a shim."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    if top is None:
        sys.exit(f"{nvcc} does not behave like nvcc:\n{dry_run.stderr}")
    return Path(top[1].strip()).resolve()


def main():
    for nvcc, source, required in candidates():
        if nvcc.is_file():
            break
        if required:
            sys.exit(f"{source} is set, but there is no {nvcc}")
    else:
        sys.exit("nvcc was not found: install cuda-toolkit[nvcc,cccl]==13.0.* with pip, or set CUDA_HOME")
    root = toolkit_root(nvcc)
    layouts = [("include", "lib64"), ("include", "lib"), ("targets/x86_64-linux/include", "targets/x86_64-linux/lib")]
    for include, lib in layouts:
        if (root / include / "cuda.h").is_file() and (root / lib / "libcudart_static.a").is_file():
            print(nvcc, root / include, root / lib, sep="\n")
            return
    sys.exit(f"the toolkit in {root} (from {source}) lacks cuda.h or libcudart_static.a")


if __name__ == "__main__":
    main()
