"""The part of an EAGLE-3 ``config.json`` that determines what the draft computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aurora_vllm.errors import AuroraError


@dataclass(frozen=True)
class Eagle3Config:
    """The keys that determine what the draft computes, under vLLM's names."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # V, the target's
    draft_vocab_size: int
    target_hidden_size: int
    num_aux_hidden_states: int = 3
    rms_norm_eps: float = 1e-6
    rope: dict[str, Any] = field(default_factory=dict)  # transformers 5's rope_parameters
    aux_layer_ids: tuple[int, ...] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3's layer: each head of q and k is normalised before RoPE
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    logit_scale: float = 1.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Eagle3Config:
        """Read a ``config.json`` (transformers 4 or 5 spelling of RoPE).

        Raises:
            AuroraError: a key is missing, or asks for something that is not implemented here.
        """
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            eagle = config.get("eagle_config") or {}
            layer_ids = aux_layer_ids(config)
            parsed = cls(
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                vocab_size=int(config["vocab_size"]),
                draft_vocab_size=int(config.get("draft_vocab_size") or config["vocab_size"]),
                target_hidden_size=int(config.get("target_hidden_size") or hidden),
                num_aux_hidden_states=int(config.get("num_aux_hidden_states") or len(layer_ids or (0, 0, 0))),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                rope=rope_parameters(config),
                aux_layer_ids=layer_ids,
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=bool(config.get("mlp_bias", False)),
                # As vLLM's registry maps them; "Eagle3Qwen3vlForCausalLM" is a Llama layer.
                qk_norm=bool({"Eagle3Qwen3ForCausalLM", "Qwen3ForCausalLM"} & set(config.get("architectures") or ())),
                norm_before_residual=bool(config.get("norm_before_residual", False)),
                norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
                fc_norm=bool(config.get("fc_norm", False)),
                norm_output=bool(config.get("norm_output", False)),
                logit_scale=float(config.get("logit_scale") or 1.0),
            )
        except KeyError as missing:
            raise AuroraError(f"the draft's config has no {missing}", "an EAGLE-3 config.json is needed") from None
        except (TypeError, ValueError) as error:
            raise AuroraError(f"the draft's config holds a wrong value: {error}") from None
        parsed._refuse_unknown(config)
        return parsed

    def _refuse_unknown(self, config: dict[str, Any]) -> None:
        wanted = {
            "num_hidden_layers": (config.get("num_hidden_layers", 1), 1),
            "hidden_act": (config.get("hidden_act", "silu"), "silu"),
            "layer_types[0]": ((config.get("layer_types") or ["full_attention"])[0], "full_attention"),
            "use_aux_hidden_state": ((config.get("eagle_config") or {}).get("use_aux_hidden_state", True), True),
            "num_attention_heads % num_key_value_heads": (self.num_attention_heads % self.num_key_value_heads, 0),
            "head_dim % 2": (self.head_dim % 2, 0),
        }
        for key, (found, needed) in wanted.items():
            if found != needed:
                raise AuroraError(f"the draft's config has {key} = {found!r}", f"only {needed!r} can be trained")


def aux_layer_ids(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The auxiliary layers a ``config.json`` names, where vLLM looks for them
    (``GPUModelRunner._get_eagle3_aux_layers_from_config``); None where it names none."""
    nested = config.get("eagle_config") or {}
    ids = config.get("eagle_aux_hidden_state_layer_ids") or nested.get("eagle_aux_hidden_state_layer_ids")
    return tuple(ids) if ids else None


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """One dictionary from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope
