"""What the server's day serves: attention layers of different kinds, and how much of a day there is."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Model:
    """One attention layer and its pool."""

    name: str
    dtype: str = "bfloat16"
    heads: int = 8
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    page_size: int = 16
    num_pages: int = 1024
    rotary_dim: int = 0
    interleaved: bool = True
    window: int = -1  # keys to the left of a query
    chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False

    @property
    def is_fp8(self):
        return self.dtype == "float8_e4m3fn"

    @property
    def out_dtype(self):
        return "bfloat16" if self.is_fp8 else self.dtype

    @property
    def scale(self):
        return self.head_dim**-0.5

    @cached_property
    def without_softcap(self):
        return replace(self, softcap=0.0)

    @cached_property
    def sinks(self):
        return np.linspace(-2, 3, self.heads, dtype=np.float32)

    @cached_property
    def descales(self):
        """One factor for each head of q, k and v."""
        return {name: np.linspace(low, 1.5, heads, dtype=np.float32) for name, low, heads in (
            ("q_descale", 0.5, self.heads), ("k_descale", 0.75, self.heads_kv), ("v_descale", 0.6, self.heads_kv))}

    @property
    def options(self):
        """The keywords of a call that are numbers."""
        options = {"causal": True}
        if self.window >= 0:
            options["window_size"] = (self.window, -1)
        if self.chunk:
            options["attention_chunk"] = self.chunk
        if self.softcap:
            options["softcap"] = self.softcap
        return options

    def describe(self):
        dims = f"{self.head_dim}/{self.head_dim_v}" if self.head_dim != self.head_dim_v else self.head_dim
        parts = [self.dtype, f"{self.heads} heads on {self.heads_kv}", f"head_dim {dims}",
                 f"{self.num_pages:,} pages of {self.page_size}"]
        if self.rotary_dim:
            parts.append(f"rotary {self.rotary_dim} {'interleaved' if self.interleaved else 'in halves'}")
        if self.window >= 0:
            parts.append(f"window {self.window}")
        parts += [f"{name} {value:g}" for name, value in (("chunk", self.chunk), ("softcap", self.softcap)) if value]
        return ", ".join(parts + ["sinks"] * self.has_sinks + ["descales"] * self.is_fp8)


@dataclass(frozen=True)
class Load:
    """How long sequences are and how many come at once."""

    live: int  # sequences at a time, about
    prompt: int  # rows of the longest
    output: int  # tokens generated at most
    chunk: int  # rows of a prompt in one call, at most
    graph_sequences: int = 16  # that a captured call has room for


ON_GPU = Load(live=48, prompt=900, output=80, chunk=192)
ON_CPU = Load(live=12, prompt=40, output=20, chunk=17)

GPU_MODELS = (
    Model("plain", heads=32, heads_kv=8, head_dim=128, head_dim_v=128, rotary_dim=128, interleaved=False,
          num_pages=512),
    Model("d80", "float16", heads=16, head_dim=80, head_dim_v=80, page_size=64, num_pages=128, rotary_dim=32),
    Model("window", heads=8, heads_kv=1, page_size=8, num_pages=1000, rotary_dim=64, window=127),
    Model("wide", "float16", heads=6, head_dim=256, head_dim_v=256, page_size=256, num_pages=48, rotary_dim=64),
    Model("unequal", heads=14, head_dim=192, head_dim_v=128, page_size=24, num_pages=320, has_sinks=True),
    Model("rows", "float16", heads=5, heads_kv=5, head_dim=96, head_dim_v=96, page_size=1, num_pages=7000, softcap=20),
    Model("fp8", "float8_e4m3fn", heads=16, heads_kv=4, head_dim=128, head_dim_v=128, page_size=32, num_pages=250),
    Model("chunks", heads=8, heads_kv=4, head_dim=112, head_dim_v=112, page_size=128, num_pages=72, chunk=100,
          rotary_dim=112),
)
CPU_MODELS = tuple(
    replace(model, heads=min(model.heads, 6), heads_kv=min(model.heads_kv, 2) if model.heads > 5 else 1,
            head_dim=32, head_dim_v=24, page_size=min(model.page_size, 12), rotary_dim=min(model.rotary_dim, 32),
            num_pages=240 // min(model.page_size, 12), window=min(model.window, 11),
            chunk=min(model.chunk, 10))
    for model in GPU_MODELS)


def choose(gpu):
    """The models and the load of a backend."""
    return (GPU_MODELS, ON_GPU) if gpu else (CPU_MODELS, ON_CPU)
