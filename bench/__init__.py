"""Times fa3 beside cuDNN and FlashAttention-2 in one run: ``python -m bench forward``."""

import sys
from pathlib import Path

# `python -m bench` puts the checkout first on the path, where fa3/ has no compiled modules: an installed fa3 goes
# before it.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent.parent:
    sys.path.append(sys.path.pop(0))
