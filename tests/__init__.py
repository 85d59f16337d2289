"""Tests. Each process computes on one thread: small tensors need only that, and several processes share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
