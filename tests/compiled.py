"""Which kernels this build has: `-Dkernels=minimal` leaves out all but head dim 128 in bfloat16."""

from fa3 import _core

MINIMAL = {(v["dtype"], v["head_dim"]) for v in _core.variants()} == {("bfloat16", 128)}
