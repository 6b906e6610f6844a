"""Code that imports nothing of the layers above. All but `kernels.py` fits any trainer."""

import os

# Let idle OpenMP threads sleep quickly: 5x faster on a shared CPU. Must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
