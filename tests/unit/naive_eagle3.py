"""The objective written for reading, not for speed: padded, dense masks, all rows computed. Tests compare with it.

It goes about it as the release does (ids, states and masks shift left by one at each step, zeros move in), so it shares
no idea with the packed implementation under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.target import TargetHead


@dataclass
class Sizes:
    """Sizes of a random case; lengths and prompts per sequence."""

    lengths: list[int]
    prompts: list[int]
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 4
    hidden: int = 6
    vocab: int = 19
    draft_vocab: int = 11
    ttt: int = 3
    start: int = 0

    def config(self, **options: Any) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden,
            "intermediate_size": 7,
            "num_attention_heads": self.kv_heads * self.group,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "draft_vocab_size": self.draft_vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100.0,
            **options,
        }


def random_case(sizes: Sizes, seed: int = 0, **options: Any) -> tuple[Eagle3Draft, TargetHead, Batch]:
    """A draft, a target's head and a batch, all random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    draft = Eagle3Draft(Eagle3Config.from_hf(sizes.config(**options)))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(normal(*parameter.shape) * 0.5 + (parameter.dim() == 1))
    chosen = torch.randperm(sizes.vocab, generator=generator)[: sizes.draft_vocab].sort().values
    draft.d2t.copy_(chosen - torch.arange(sizes.draft_vocab))
    head = TargetHead(normal(sizes.vocab, sizes.hidden), normal(sizes.vocab, sizes.hidden))
    size, rows = len(sizes.lengths), max(sizes.lengths)
    index = torch.arange(rows).expand(size, rows)
    real = index < torch.tensor(sizes.lengths).unsqueeze(1)
    batch = Batch(
        input_ids=torch.randint(0, sizes.vocab, (size, rows), generator=generator) * real,
        aux=normal(size, rows, 3 * sizes.hidden) * real.unsqueeze(-1),
        last=normal(size, rows, sizes.hidden) * real.unsqueeze(-1),
        attention_mask=real,
        loss_mask=real & (index >= torch.tensor(sizes.prompts).unsqueeze(1)),
        positions=index + sizes.start,
    )
    return draft, head, batch


def shift(x: torch.Tensor) -> torch.Tensor:
    """The next row's values in each row, zeros in the last. [B, T, ...] -> [B, T, ...]"""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def naive_logits(draft: Eagle3Draft, head: TargetHead, batch: Batch, ttt_length: int) -> list[torch.Tensor]:
    """The draft's logits [B, T, D] at each of K steps; row t of step i is about the token at t+2+i."""
    config, layer = draft.config, draft.midlayer
    size, rows = batch.input_ids.shape
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def split(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.view(size, rows, n, dim).transpose(1, 2).repeat_interleave(heads // n, dim=1)

    ids = shift(batch.input_ids)
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    diagonal = torch.eye(rows, dtype=torch.bool)
    embedding = draft.embed_tokens if draft.embed_tokens is not None else head.embed_tokens

    hidden, keys, values, masks = draft.combine(batch.aux), [], [], []
    result = []
    for i in range(ttt_length):
        tokens = layer.input_layernorm(F.embedding(ids, embedding))
        normed = layer.hidden_norm(hidden)
        residual = normed if config.norm_before_residual else hidden
        x = torch.cat([tokens, normed], -1)
        angle = (batch.positions + i).unsqueeze(-1) * draft.frequencies  # [B, T, D / 2]
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)

        def rope(y: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
            a, b = y[..., : dim // 2], y[..., dim // 2 :]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        query, key = split(layer.self_attn.q_proj(x), heads), split(layer.self_attn.k_proj(x), kv_heads)
        if config.qk_norm:
            query, key = layer.self_attn.q_norm(query), layer.self_attn.k_norm(key)
        query = rope(query)
        keys.append(rope(key))
        values.append(split(layer.self_attn.v_proj(x), kv_heads))
        masks.append(causal if i == 0 else diagonal)
        scores = query @ torch.cat(keys, 2).transpose(2, 3) / dim**0.5
        scores = scores.masked_fill(~torch.cat(masks, 1), -torch.inf)
        attended = (scores.softmax(-1) @ torch.cat(values, 2)).transpose(1, 2).flatten(2)
        residual = residual + layer.self_attn.o_proj(attended)
        output = residual + layer.mlp(layer.post_attention_layernorm(residual))
        normed_output = draft.norm(output)
        hidden = normed_output if config.norm_output else output
        result.append(config.logit_scale * draft.lm_head(normed_output))
        ids = shift(ids)
    return result


def naive_mask(batch: Batch, semantics: str, prompt_weight: float) -> torch.Tensor:
    """Weight of row t at step 0; at step i that of row t+i counts. float32 [B, T]"""
    mask = batch.loss_mask.float()
    if semantics == "default":
        mask = shift(mask + prompt_weight * (batch.attention_mask & ~batch.loss_mask))
    return mask


def naive_loss(
    draft: Eagle3Draft,
    head: TargetHead,
    batch: Batch,
    ttt_length: int,
    semantics: str = "default",
    prompt_weight: float = 0.0,
) -> tuple[torch.Tensor, list[float], list[float]]:
    """Total, mean loss of each step, top-1 accuracy of each step."""
    states, mask = shift(batch.last), naive_mask(batch, semantics, prompt_weight)
    target_head = head.lm_head[draft.target_ids]
    member = torch.zeros(draft.config.vocab_size).index_fill(0, draft.target_ids, 1.0)
    total, losses, accuracies = torch.zeros(()), [], []
    for i, logits in enumerate(naive_logits(draft, head, batch, ttt_length)):
        target = (states @ target_head.T).softmax(-1)
        valid = mask * member[(states @ head.lm_head.T).argmax(-1)]
        cross_entropy = -(target * logits.log_softmax(-1)).sum(-1)
        loss = (cross_entropy * valid).sum() / valid.sum().clamp(min=1e-30)
        right = (logits.argmax(-1) == target.argmax(-1))[valid > 0].float()
        total = total + 0.8**i * loss
        losses.append(float(loss.detach()))
        accuracies.append(float(right.mean()) if len(right) else 0.0)
        states, mask = shift(states), shift(mask)
    return total, losses, accuracies
