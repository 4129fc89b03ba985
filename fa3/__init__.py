"""Exact attention at the speed of Hopper GPUs, for the arrays of any framework, and on any CPU."""

try:
    from fa3._core import get_library
except ModuleNotFoundError as error:
    raise ImportError("fa3 was imported from its source folder, which has no compiled modules: run Python from "
                      "another folder (or with -P), or install fa3 as editable") from error
from fa3._errors import CudaError
from fa3.attention import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from fa3.backward import flash_attn_backward, flash_attn_varlen_backward
from fa3.fp8 import quantize_fp8

__all__ = [
    "CudaError",
    "flash_attn_backward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_backward",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_include",
    "get_library",
    "get_scheduler_metadata",
    "quantize_fp8",
]


def get_include():
    """The folder that has ``fa3.h``, the C interface."""
    from importlib.resources import files  # not at import: it would take longer than all else here

    return str((files(__name__) / "include" / "fa3.h").parent)


def __getattr__(name):
    if name == "__version__":  # kept in the package's metadata alone, and read when asked for
        from importlib.metadata import version

        return version(__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
