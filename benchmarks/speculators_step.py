"""The training step of speculators, on our draft and our batch.

It is what their trainer does with a batch (speculators/train/trainer.py, 0.9.0): forward under autocast, backward, clip
to norm 1, AdamW. Their data loader is left out, as is ours, and with it the padding it would add. Differences:

    loss       Theirs is KL(p || q), ours -sum p log q = KL + H(p): the same gradient. Temperature 1 in both.
    rows       Theirs counts the rows of its mask; ours leaves out rows whose first choice the draft cannot propose.
               Here theirs gets that smaller mask, so both average over the same rows.
    decay      Theirs is 1.0 by default; here 0.8, as ours.
    lm_head    Theirs is frozen at the target's, ours is trained. Here both are trained unless ``head_frozen``.
    target     Theirs reads the states before the target's final norm and applies it; ours gets them normalised.
    optimizer  Theirs is AdamW with weight decay 0.01 and betas (0.9, 0.999), not fused; here both use ours, fused.
    loss code  Theirs is a Triton kernel, which does not run on a CPU: here their eager one.
    attention  Theirs is flex_attention, which has no backward on a CPU (torch 2.13): here sdpa or eager.
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
# AdamW's settings and the clipping norm: the defaults of our ``Trainer``.
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.99), 0.0, 1.0
# speculators, and what it imports that vLLM's environment lacks. Its declared requirements would replace a CPU torch.
PACKAGES = f"speculators=={VERSION} hs-connectors=={VERSION} 'datasets<=5.1.0' pyarrow pandas multiprocess xxhash"


@dataclass(frozen=True)
class Variant:
    """A way to run their step on a CPU."""

    attention: str  # sdpa or eager, their --draft-attn-impl
    dtype: torch.dtype  # of autocast
    compiled: bool = False  # by torch.compile, which they do not use on a CPU

    @property
    def name(self) -> str:
        return f"{self.attention} {str(self.dtype).removeprefix('torch.')}{' compiled' if self.compiled else ''}"


def require_speculators() -> str:
    """The installed version of speculators.

    Raises:
        AuroraError: it, or something that it imports, is not installed.
    """
    try:
        import speculators.models.eagle3  # noqa: F401
    except ImportError as error:
        raise AuroraError(
            f"speculators cannot be imported ({error})", f"python -m pip install --no-deps {PACKAGES}"
        ) from None
    return version("speculators")


def their_tensors(draft: Eagle3Draft, head: TargetHead, final_norm: torch.Tensor) -> dict[str, torch.Tensor]:
    """The complete ``state_dict`` of their model for our draft, as copies.

    Args:
        final_norm: [H], the weight of the target's final norm.
    """
    tensors = {speculators_name(name): t for name, t in checkpoint_tensors(draft, torch.float32).items()}
    tensors.setdefault("embed_tokens.weight", head.embed_tokens)
    tensors["verifier_norm.weight"] = final_norm
    tensors["verifier_lm_head.weight"] = head.rows(draft.target_ids)
    return {name: t.detach().clone() for name, t in tensors.items()}


def their_model(draft: Eagle3Draft, head: TargetHead, final_norm: torch.Tensor, attention: str) -> Any:
    """Their ``Eagle3DraftModel`` with our draft's weights, float32. The draft's layer must be Llama's."""
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
    """Our batch in their form: all sequences in one row [1, N], each shifted by one and so one row shorter.

    Args:
        batch: ours.
        states: float32 [B, T, H], the target's states before its final norm.
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
        learning_rate, ttt_length: as in our ``Trainer``.
        head_frozen: do not train ``lm_head``, as they do.
    """

    def __init__(
        self,
        model: Any,
        variant: Variant,
        learning_rate: float,
        ttt_length: int,
        head_frozen: bool = False,
    ) -> None:
        from speculators.losses import resolve_loss_config

        self.model, self.dtype = model, variant.dtype
        model.lm_head.weight.requires_grad_(not head_frozen)
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=learning_rate,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
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
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return float(loss.detach())
