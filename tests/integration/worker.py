"""AuroraWorker with windows: RPCs that let a test look at and touch the running models."""

from __future__ import annotations

import torch

from aurora_vllm.spec_decode.worker import AuroraWorker


class InspectableWorker(AuroraWorker):
    """Adds RPCs; changes nothing."""

    @torch.inference_mode()
    def draft_logits(self, hidden: list[list[float]]) -> list[list[float]]:
        """Logits of the running draft's lm_head over its draft vocabulary. hidden: [n, H]"""
        draft = self.model_runner.get_draft_model()
        out = draft.logits_processor(draft.lm_head, torch.tensor(hidden))
        return out.tolist()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def target_logits(self, hidden: list[list[float]]) -> list[list[float]]:
        """Logits of the running target for given final hidden states. hidden: [n, H]"""
        return self.model_runner.get_model().compute_logits(torch.tensor(hidden)).tolist()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def linear_outputs(self, seed: int) -> dict[str, list[float]]:
        """What each linear layer of the running draft makes of a fixed random input (one row)."""
        draft = self.model_runner.get_draft_model()
        layer = draft.model.layers[0]
        modules = {
            "fc": draft.model.fc,
            "qkv": layer.self_attn.qkv_proj,
            "o": layer.self_attn.o_proj,
            "gate_up": layer.mlp.gate_up_proj,
            "down": layer.mlp.down_proj,
        }
        outputs: dict[str, list[float]] = {}
        for name, module in modules.items():
            generator = torch.Generator().manual_seed(seed)
            result = module(torch.randn(1, module.input_size, generator=generator))
            outputs[name] = (result[0] if isinstance(result, tuple) else result).flatten().tolist()
        return outputs

    def lent_ends_are_the_checkpoints(self) -> list[bool]:
        """Of the target's embedding and lm_head: whether what a learner would be lent is what the checkpoint says."""
        from aurora_vllm.learner.target import load_target_head
        from aurora_vllm.session import Session
        from aurora_vllm.spec_decode.target_head import find_target_head

        session = Session.from_environment()
        assert session is not None
        ends = find_target_head(self.model_runner.get_model(), session.hidden_size, session.row_layout.dtype)
        assert ends is not None
        stored = load_target_head(session.target)
        pairs = ((ends.embedding, stored.embed_tokens), (ends.lm_head, stored.lm_head))
        return [torch.equal(running[: len(kept)], kept) for running, kept in pairs]

    def kv_bytes_per_token(self) -> tuple[dict[str, float], float]:
        """Of each layer, as vLLM has laid the cache out; and of all of the target's, as the plan works it out."""
        from aurora_vllm.models import kv_width

        found = {}
        for group in self.model_runner.kv_cache_config.kv_cache_groups:
            specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
            for name in group.layer_names:
                spec = specs.get(name, group.kv_cache_spec)
                found[name] = spec.page_size_bytes / spec.block_size
        width = kv_width(self.vllm_config.model_config)
        assert width is not None
        return found, width * self.vllm_config.model_config.dtype.itemsize

    def runner_class(self) -> str:
        return f"{type(self.model_runner).__module__}.{type(self.model_runner).__qualname__}"

    def draft_runs(self) -> int:
        """Forward passes of the draft model since this was first asked."""
        if not hasattr(self, "_draft_runs"):
            self._draft_runs = 0
            self.model_runner.get_draft_model().register_forward_hook(self._count_draft_run)
        return self._draft_runs

    def _count_draft_run(self, *_: object) -> None:
        self._draft_runs += 1

    def share_lm_head_message(self) -> str:
        """What LiveDraft says to a draft whose lm_head is the target's."""
        from aurora_vllm.spec_decode.draft_layout import SwapRefused
        from aurora_vllm.spec_decode.swap import LiveDraft

        draft, target = self.model_runner.get_draft_model(), self.model_runner.get_model()
        own = draft.lm_head
        draft.lm_head = target.lm_head
        try:
            LiveDraft(draft, target)
        except SwapRefused as refusal:
            return str(refusal)
        finally:
            draft.lm_head = own
        return ""

    def unmend_sampling(self) -> None:
        """Undo mend_cpu_sampling: a fresh copy of vLLM's module has the original function."""
        import importlib.util

        from vllm.v1.sample import rejection_sampler

        spec = importlib.util.spec_from_file_location("original_rejection_sampler", rejection_sampler.__file__)
        original = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(original)  # type: ignore[union-attr]
        function = original.expand_batch_to_tokens
        function.__globals__["_expand"] = rejection_sampler._expand  # the kernel the platform put in place
        rejection_sampler.expand_batch_to_tokens = function

    def mend_sampling(self) -> bool:
        from aurora_vllm.spec_decode.sampling_fix import mend_cpu_sampling

        return mend_cpu_sampling()
