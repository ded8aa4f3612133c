"""LoRA adapters are the target's; the draft reads plain embeddings.

vLLM lets an EAGLE draft share the target's embedding, which ``--enable-lora`` has wrapped by then. So the draft would
apply the adapters' rows for embeddings, by a mapping of the target's tokens: in its second pass, over one token a
request, that mapping is of other tokens, and on a CPU the engine ends ("einsum(): subscript b has size ...").
"""

from __future__ import annotations

from typing import Any


def read_plain_embeddings(draft: Any) -> bool:
    """Give a draft the embedding inside the wrapper. Before it is compiled. Returns whether there was a wrapper.

    Args:
        draft: vLLM's ``Eagle3LlamaForCausalLM``, its embedding shared.
    """
    embedding = getattr(draft.model, "embed_tokens", None)
    plain = getattr(embedding, "base_layer", None)  # vllm.lora.layers.VocabParallelEmbeddingWithLoRA
    if plain is None:
        return False
    draft.model.embed_tokens = plain
    return True
