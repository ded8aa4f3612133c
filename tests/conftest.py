"""For all tests: threads, kernels, the clock and garbage.

Where two processes of tests share the machine (`make test`), each computes with one thread: two threads each, on two
cores, would wait for one another at every operator's end.
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# The imports of torch and vLLM make some million objects that stay. To look at them for garbage again and again takes a
# fifth of the time of the imports, and then of every test that makes many objects.
gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # at the interpreter's end they are garbage, and nanobind complains about what is left


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
