"""Rejected branches from a real vLLM: the learner's chain proposes, token by token, what the server's draft did.

A branch whose root, or the step it leaves the path at, were off by one would be learned from with another draft state.
"""

from __future__ import annotations

from collections import Counter

import torch

from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.branches import find_chains, unroll_branches
from aurora_vllm.learner.draft import load_draft, load_tensors
from aurora_vllm.learner.loss import draft_choices
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.unroll import plan_unroll, unroll
from aurora_vllm.session import CHECKPOINT_VERSION
from benchmarks.engine import Engine

PROMPTS = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The capital of France is",
    "1 2 3 4 5 6 7 8",
    "Once upon a time there was a",
    "import os\nimport sys\n\n\ndef main():\n",
    "a b c a b c a b c a b",
]
DRAFTS = 3  # the engine's K


@torch.no_grad()
def test_a_chain_proposes_what_the_server_did(engine: Engine) -> None:
    engine.let_requests_end()
    engine.drain()
    engine.generate(PROMPTS, max_tokens=48)
    engine.let_requests_end()
    trajectories = Assembler(engine.session.row_layout).feed(engine.drain())
    assert len(trajectories) == len(PROMPTS)
    draft, head = load_draft(engine.session.draft), load_target_head(engine.session.target)
    version = engine.control.worker.live_version
    if version != CHECKPOINT_VERSION:  # another test published before
        load_tensors(draft, {name: t.clone() for name, t in engine.bank.read(version).tensors.items()})

    batch = collate(trajectories)
    chains = find_chains(batch, DRAFTS + 1)  # one step more than the server takes: it reads the last draft
    nothing = torch.zeros(len(trajectories), batch.input_ids.shape[1] + 1, dtype=torch.bool)
    plan = plan_unroll(nothing, DRAFTS + 1, chains.needed(batch))
    path = unroll(draft, head, batch, plan, DRAFTS + 1)
    outputs = unroll_branches(draft, head, batch, plan, path, chains)
    on_path = draft_choices(draft, head, batch, DRAFTS, batch.attention_mask)

    right, wrong = Counter[str](), Counter[str]()
    for n, (b, root, leaves) in enumerate(
        zip(chains.sequence.tolist(), chains.root.tolist(), chains.leaves.tolist(), strict=True)
    ):
        accepted = leaves - 1
        for step in range(accepted):
            same = int(on_path[step, b, root]) == int(batch.input_ids[b, root + 2 + step])
            (right if same else wrong)["accepted draft"] += 1
        # The rejected draft itself: proposed with the right prefix, at the path's step `accepted`.
        if root + 1 + accepted < int(batch.attention_mask[b].sum()):
            same = int(on_path[accepted, b, root]) == int(chains.tokens[n, leaves])
            (right if same else wrong)[f"rejected draft {accepted}"] += 1
        for step in range(leaves, DRAFTS):
            choice = draft.target_ids[draft.lm_head(draft.norm(outputs[step][n])).argmax()]
            same = int(choice) == int(chains.tokens[n, step + 1])
            (right if same else wrong)[f"draft {step} behind {accepted} accepted"] += 1
    assert right["rejected draft 0"] > 50 and right["rejected draft 1"] > 5, right
    assert right["draft 1 behind 0 accepted"] > 50 and right["draft 2 behind 1 accepted"] > 5, right
    assert right["draft 2 behind 0 accepted"] > 50, right
    assert wrong.total() <= right.total() // 100, (right, wrong)  # float32 and near ties
