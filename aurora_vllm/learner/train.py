"""The trainer: AdamW on the draft, one batch a step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.loss import LossOutput, Semantics, ttt_loss
from aurora_vllm.learner.target import TargetHead


def fast_matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32.

    Measured on an AVX512-BF16 core with SmolLM2-135M: 1.5 times the tokens a second, gradients within 0.8 %, the same
    acceptance length on unseen prompts (1.394 both, after 43 steps).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


class Trainer:
    """Trains a draft in place.

    Args:
        draft: float32; its parameters are trained, embedding and ``d2t`` are not.
        head: the target's frozen ends.
        learning_rate: AdamW's, after ``warmup_steps`` linear steps.
        ttt_length: K, unroll steps.
        semantics, prompt_weight: see ``ttt_loss``.
        matmul_dtype: see ``ttt_loss``; None takes what the hardware is fast in. Parameters and AdamW stay float32.
        betas, weight_decay: AdamW's. A draft is trained for a few hundred steps, which the usual 0.999 outlasts.
        max_grad_norm: gradients are scaled down to this norm.

    ``steps`` counts optimizer steps, ``skipped`` batches whose loss or gradient was not finite (nothing was changed by
    them), ``empty`` batches without a row to learn from.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        head: TargetHead,
        learning_rate: float,
        ttt_length: int,
        *,
        semantics: Semantics = "default",
        prompt_weight: float = 0.0,
        matmul_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 3,
    ) -> None:
        self.draft, self.head = draft, head
        self.learning_rate, self.ttt_length = learning_rate, ttt_length
        self.semantics, self.prompt_weight = semantics, prompt_weight
        self.matmul_dtype = matmul_dtype or fast_matmul_dtype(draft.fc.weight.device)
        self.max_grad_norm, self.warmup_steps = max_grad_norm, warmup_steps
        self.parameters = list(draft.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        self.steps = self.skipped = self.empty = 0

    def step(self, batch: Batch) -> LossOutput:
        """One optimizer step. The returned ``total`` is detached."""
        output = ttt_loss(
            self.draft, self.head, batch, self.ttt_length, self.semantics, self.prompt_weight, self.matmul_dtype
        )
        result = replace(output, total=output.total.detach())
        if not output.step_rows.any():
            self.empty += 1
            return result
        if not torch.isfinite(result.total):
            self.skipped += 1
            return result
        self.optimizer.zero_grad(set_to_none=True)
        output.total.backward()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if not math.isfinite(norm):
            self.skipped += 1
            return result
        if norm > self.max_grad_norm:
            torch._foreach_mul_(grads, self.max_grad_norm / norm)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, self.steps / max(self.warmup_steps, 1))
        self.optimizer.step()
        return result
