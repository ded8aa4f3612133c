"""For all tests: where two processes of tests share the machine (`make test`), each computes with one thread.

Two threads each, on two cores, would wait for one another at every operator's end.
"""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch, and for the servers that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Our Triton kernels run in its interpreter, which Triton decides on when it is imported. Nothing else here has kernels.
# tests/gpu have theirs compiled, in processes of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")
