"""Where processes that tests start look for modules."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def python_path(*first: Path) -> str:
    """A ``PYTHONPATH``: these, this repository, and where this process was told to look: there may be another vLLM."""
    return os.pathsep.join([*map(str, first), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
