"""For all tests: threads, kernels and the clock.

Where two processes of tests share the machine (`make test`), each computes with one thread: two threads each, on two
cores, would wait for one another at every operator's end.
"""

from __future__ import annotations

import os
from contextlib import suppress

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch, and for the servers that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Our Triton kernels run in its interpreter, which Triton decides on when it is imported. Nothing else here has kernels.
# tests/gpu have theirs compiled, in processes of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example may take says how busy the machine is, not whether the property holds.
with suppress(ImportError):  # tests/gpu also run where hypothesis is not installed
    from hypothesis import HealthCheck, settings

    settings.register_profile("aurora", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("aurora")
