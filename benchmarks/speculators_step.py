"""The training step of speculators, on a draft and a batch of ours.

What their trainer does with a batch (speculators/train/trainer.py, 0.9.0): forward under autocast, backward, clip to
norm 1, AdamW. Their data loader is left out, as ours is; so is the padding it would add. Where theirs and ours differ:

    loss       theirs KL(p || q), ours -sum p log q: KL + H(p), the same gradient. Temperature 1 in both.
    rows       theirs counts what its mask says; ours leaves out rows whose first choice the draft cannot propose.
               Theirs gets that smaller mask here, so both average over the same rows.
    decay      theirs 1.0 unless told otherwise; 0.8 here, as ours.
    lm_head    theirs is frozen at the target's, ours is trained. Here both are trained unless ``head_frozen``.
    target     theirs reads the states before the target's final norm and norms them, ours gets them normed.
    optimizer  theirs is AdamW with weight decay 0.01 and betas (0.9, 0.999), not fused; here both have ours, fused.
    loss code  theirs is a Triton kernel, which no CPU runs: its eager one is taken.
    attention  theirs is flex_attention, which has no backward on a CPU (torch 2.13): sdpa or eager is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.draft import Eagle3Draft, checkpoint_tensors
from aurora_vllm.learner.draft_files import speculators_name
from aurora_vllm.learner.loss import STEP_DECAY
from aurora_vllm.learner.target import TargetHead

VERSION = "0.9.0"
# What importing it needs and vLLM's environment has not; its own requirements would replace a CPU torch.
PACKAGES = f"speculators=={VERSION} hs-connectors=={VERSION} 'datasets<=5.1.0' pyarrow pandas multiprocess xxhash"


@dataclass(frozen=True)
class Variant:
    """A way to run their step on a CPU."""

    attention: str  # sdpa or eager, their --draft-attn-impl
    dtype: torch.dtype  # of autocast
    compiled: bool = False  # by torch.compile, which they leave out on a CPU

    @property
    def name(self) -> str:
        return f"{self.attention} {str(self.dtype).removeprefix('torch.')}{' compiled' if self.compiled else ''}"


def require_speculators() -> str:
    """The version that is installed.

    Raises:
        AuroraError: none is, or something it imports is not.
    """
    try:
        import speculators.models.eagle3  # noqa: F401
    except ImportError as error:
        raise AuroraError(
            f"speculators cannot be imported ({error})", f"python -m pip install --no-deps {PACKAGES}"
        ) from None
    return version("speculators")


def their_tensors(draft: Eagle3Draft, head: TargetHead, final_norm: torch.Tensor) -> dict[str, torch.Tensor]:
    """Their model's whole ``state_dict`` for a draft of ours; copies.

    Args:
        final_norm: [H], the weight of the target's final norm.
    """
    tensors = {speculators_name(name): t for name, t in checkpoint_tensors(draft, torch.float32).items()}
    tensors.setdefault("embed_tokens.weight", head.embed_tokens)
    tensors["verifier_norm.weight"] = final_norm
    tensors["verifier_lm_head.weight"] = head.rows(draft.target_ids)
    return {name: t.detach().clone() for name, t in tensors.items()}


def their_model(draft: Eagle3Draft, head: TargetHead, final_norm: torch.Tensor, attention: str) -> Any:
    """Their ``Eagle3DraftModel`` with a draft's weights, float32. The draft's layer must be Llama's."""
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from transformers import LlamaConfig

    own = draft.config
    layer = LlamaConfig(
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=own.num_attention_heads,
        num_key_value_heads=own.num_key_value_heads,
        head_dim=own.head_dim,
        vocab_size=own.vocab_size,
        rms_norm_eps=own.rms_norm_eps,
        rope_parameters=dict(own.rope),
        attention_bias=own.attention_bias,
        mlp_bias=own.mlp_bias,
        pad_token_id=None,
    )
    layer._attn_implementation = attention
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=own.draft_vocab_size,
        norm_before_residual=own.norm_before_residual,
        norm_before_fc=own.norm_before_fc,
        fc_norm=own.fc_norm,
        norm_output=own.norm_output,
        eagle_aux_hidden_state_layer_ids=list(own.aux_layer_ids or range(own.num_aux_hidden_states)),
    )
    model = Eagle3DraftModel(config)
    model.load_state_dict(their_tensors(draft, head, final_norm))
    return model.train()


def their_batch(batch: Batch, states: torch.Tensor, counts: torch.Tensor) -> dict[str, Any]:
    """A batch of ours in their form: all sequences in one row [1, N], each shifted by one and so a row shorter.

    Args:
        batch: what our side trains on.
        states: float32 [B, T, H], the target's before its final norm.
        counts: bool [B, T], target rows that count.
    """
    real = batch.attention_mask[:, 1:]
    documents = torch.arange(len(real)).unsqueeze(1).expand_as(real)
    return {
        "input_ids": batch.input_ids[:, 1:][real].unsqueeze(0),
        "hidden_states": batch.aux[:, :-1][real].unsqueeze(0),
        "verifier_last_hidden_states": states[:, 1:][real].unsqueeze(0),
        "loss_mask": counts[:, 1:][real].unsqueeze(0),
        "position_ids": batch.positions[:, 1:][real].unsqueeze(0),
        "document_ids": documents[real].unsqueeze(0),
    }


class TheirTrainer:
    """Their training step.

    Args:
        model: from :func:`their_model`; trained in place.
        variant: how to run it.
        learning_rate, ttt_length, betas, weight_decay, max_grad_norm: as of our ``Trainer``.
        head_frozen: leave ``lm_head`` as it is, as they do.
    """

    def __init__(
        self,
        model: Any,
        variant: Variant,
        learning_rate: float,
        ttt_length: int,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        head_frozen: bool = False,
    ) -> None:
        from speculators.losses import resolve_loss_config

        self.model, self.dtype, self.max_grad_norm = model, variant.dtype, max_grad_norm
        model.lm_head.weight.requires_grad_(not head_frozen)
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
        )
        self._forward = torch.compile(model) if variant.compiled else model
        self._options = {
            "ttt_steps": ttt_length,
            "ttt_step_loss_decay": STEP_DECAY,
            "loss_config": resolve_loss_config("kl_div", "eager"),
        }

    def step(self, batch: dict[str, Any]) -> float:
        """One optimizer step on a batch of :func:`their_batch`. Returns the loss before it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            _, loss, _ = self._forward(**batch, **self._options)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach())
