"""Which targets vLLM takes an EAGLE-3 draft for, by the sources of the installed one."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from aurora_vllm.spec_decode.eagle3_support import takes_eagle3

pytest.importorskip("vllm")


FAMILIES = ("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe", "Olmo", "OPT")


def test_agrees_with_vllm() -> None:
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import ModelRegistry

    said = {}
    for architecture in [f"{family}ForCausalLM" for family in FAMILIES]:
        known = ModelRegistry.models[architecture]
        model = getattr(importlib.import_module(known.module_name), known.class_name)
        said[architecture] = takes_eagle3(architecture)
        assert said[architecture] == supports_eagle3(model), architecture
    assert set(said.values()) == {True, False}


def test_a_class_from_elsewhere_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    assert takes_eagle3("NobodysForCausalLM")
    plugin = SimpleNamespace(module_name="somebodys.models", class_name="Model")
    monkeypatch.setitem(ModelRegistry.models, "SomebodysForCausalLM", plugin)
    assert takes_eagle3("SomebodysForCausalLM")
