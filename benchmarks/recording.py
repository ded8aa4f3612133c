"""Traffic recorded from a real engine's capture: trajectories as the learner would have received them."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import Progress

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.curriculum import Curriculum
from aurora_vllm.learner.draft import load_draft
from aurora_vllm.learner.publish import publish
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.trajectory import Branch, Trajectory
from aurora_vllm.session import CHECKPOINT_VERSION
from benchmarks.engine import SERVER, Engine
from demo.model import ensure_model
from demo.workload import GSM8K, gsm8k, humaneval

CONCURRENCY = 8


def record(rows: int, unseen: int, tokens: int, seed: int, console: Console) -> tuple[list[Trajectory], str]:
    """Serve real prompts greedily, and assemble the captured rows into trajectories.

    The draft gets its lessons as in a server and proposes from the first one on, so that there are rejected branches to
    learn from. The answers do not depend on it.

    Args:
        rows: rows to record for learning, prompts included.
        unseen: requests to record in addition, for measuring on prompts that were not learned from.
        tokens: longest answer.
        seed: of the order of the prompts.

    Returns:
        Trajectories in the order they ended, of which the last ``unseen`` are for measuring, and the domain's name.
    """
    domain, problems = ("GSM8K", gsm8k()) if GSM8K.is_file() else ("HumanEval", humaneval())
    prompts = [wordings[0].text for wordings in problems]
    random.Random(seed).shuffle(prompts)
    done: list[Trajectory] = []
    with TemporaryDirectory() as scratch, Progress(console=console) as progress:
        engine = Engine.start(ensure_model(), Path(scratch), speculate="never", enforce_eager=False, **SERVER)
        bar = progress.add_task(f"recording {domain}", total=rows)
        target = engine.session.target
        lessons = Curriculum(
            load_draft(engine.session.draft), load_target_head(target), AuroraConfig(), target, worth_keeping=False
        )
        try:
            tokenizer = engine.llm.get_tokenizer()
            assembler = Assembler(engine.session.row_layout)
            recorded = after = 0
            for start in range(0, len(prompts), CONCURRENCY):
                chats = [[{"role": "user", "content": text}] for text in prompts[start : start + CONCURRENCY]]
                ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
                engine.generate(ids, max_tokens=tokens, ignore_eos=False)
                engine.let_requests_end()
                for one in assembler.feed(engine.drain()):
                    done.append(one)
                    after += recorded >= rows
                    recorded += len(one.token_ids)
                    lessons.add(one)
                _teach(engine, lessons)
                progress.update(bar, completed=min(recorded, rows))
                if after >= unseen:
                    return done[: len(done) - after + unseen], domain
        finally:
            engine.close()
    raise ValueError(f"{domain} has only {recorded} rows")


def _teach(engine: Engine, lessons: Curriculum) -> None:
    """Give the lessons that are due, one after the other, and publish the draft after each that changed it."""
    while lessons.next() in ("first lesson", "lesson"):
        if lessons.work():
            version = max(engine.bank.published(), CHECKPOINT_VERSION) + 1
            publish(engine.bank, version, lessons.candidate, {"reason": "a lesson"})
            engine.wait_for(lambda version=version: engine.control.worker.staged_version == version)
            engine.choose_draft_length("always")


def save_recording(path: Path, trajectories: list[Trajectory], domain: str, unseen: int) -> None:
    """Write one file with token ids and hidden states. They are of the benchmark's own prompts only."""
    rows = [vars(one) | {"branches": [vars(branch) for branch in one.branches]} for one in trajectories]
    torch.save({"trajectories": rows, "domain": domain, "unseen": unseen}, path)


def load_recording(path: Path) -> tuple[list[Trajectory], str, int]:
    """Trajectories, the domain's name, and how many of the last trajectories are for measuring."""
    stored = torch.load(path, weights_only=True)
    trajectories = [
        Trajectory(**(one | {"branches": [Branch(**branch) for branch in one["branches"]]}))
        for one in stored["trajectories"]
    ]
    return trajectories, stored["domain"], stored["unseen"]
