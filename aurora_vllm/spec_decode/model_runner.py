"""Predicts which of its two model runners vLLM will use."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Literal

from aurora_vllm.errors import AuroraError


@dataclass(frozen=True)
class ModelRunner:
    """The model runner that vLLM will use, and why."""

    name: Literal["V1", "V2"]
    reason: str


def choose_runner() -> ModelRunner:
    """Predict vLLM's choice before its configuration exists (vllm/config/vllm.py, ``use_v2_model_runner``).

    vLLM may still fall back to V1 for what V2 cannot do, and logs that; the worker attaches to the runner it finds.

    Raises:
        AuroraError: the environment variable has a wrong value, or one with which vLLM would end.
    """
    name = "VLLM_USE_V2_MODEL_RUNNER"
    said = os.environ.get(name)
    if said not in (None, "0", "1"):
        raise AuroraError(f"{name} is {said!r}", "set it to 0 or 1, or leave the choice to vLLM")
    if said == "0":
        return ModelRunner("V1", f"{name}=0")
    if not importlib.import_module("vllm.triton_utils").HAS_TRITON:
        if said == "1":
            raise AuroraError(f"{name}=1, and there is no Triton for this device", f"unset {name}: V1 needs none")
        return ModelRunner("V1", "no Triton for this device")
    return ModelRunner("V2", f"{name}=1" if said else "vLLM's default")
