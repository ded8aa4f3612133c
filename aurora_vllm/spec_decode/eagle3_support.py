"""Whether vLLM takes an EAGLE-3 draft for a target, known before the target is loaded."""

from __future__ import annotations

import importlib

from aurora_vllm.spec_decode.vllm_sources import NoSuchSymbol, VllmSources

_MODELS = "vllm.model_executor.models"
_METHOD = "set_aux_hidden_state_layers"


def takes_eagle3(architecture: str) -> bool:
    """Whether the class that vLLM runs for an architecture hands out auxiliary hidden states: whether it inherits
    ``SupportsEagle3``, without which vLLM ends once the model is loaded.

    This is read from vLLM's sources, because importing a model's module may initialise CUDA in this process. For a
    class from elsewhere (a plugin, another vLLM) the answer is yes: vLLM then finds out itself.
    """
    try:
        registry = importlib.import_module(f"{_MODELS}.registry").ModelRegistry
    except (ImportError, AttributeError):
        return True
    known = registry.models.get(architecture)
    model = f"{getattr(known, 'module_name', 'elsewhere')}:{getattr(known, 'class_name', '')}"
    sources = VllmSources.installed()
    can_tell = _defines(sources, model) and _defines(sources, f"{_MODELS}.interfaces:SupportsEagle3.{_METHOD}")
    return not can_tell or _defines(sources, f"{model}.{_METHOD}")


def _defines(sources: VllmSources, symbol: str) -> bool:
    try:
        sources.source(symbol)
    except NoSuchSymbol:
        return False
    return True
