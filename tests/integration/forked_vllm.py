"""A fork of vLLM as a person would keep it: the installed one under patches/vllm-VERSION.patch, in its own directory.

Run as a program it serves a few requests with that fork, plain worker and scheduler, and prints what was captured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aurora_vllm.spec_decode.consent import is_private
from aurora_vllm.spec_decode.vllm_sources import VllmSources

if TYPE_CHECKING:
    from benchmarks.engine import Engine

BIASED = 7  # a token that the target says only if it has to
PATCH = Path(__file__).parents[2] / "patches" / f"vllm-{VllmSources.installed().version}.patch"


def touched() -> list[str]:
    """The files the patch changes, as paths below the directory that holds vllm."""
    return [line.removeprefix("+++ b/") for line in PATCH.read_text().splitlines() if line.startswith("+++ b/")]


def make_fork(directory: Path, installed: Path) -> Path:
    """Link every file of the installed package but copy and patch those that are touched. Returns where it lies.

    Args:
        installed: the directory that holds the installed ``vllm``.
    """
    _link(installed / "vllm", directory / "vllm", {installed / name for name in touched()})
    for name in touched():
        (directory / name).write_bytes((installed / name).read_bytes())
    subprocess.run(["git", "apply", "-p1", str(PATCH)], cwd=directory, check=True, env={"GIT_CEILING_DIRECTORIES": "/"})
    return directory


def _link(source: Path, target: Path, changed: set[Path]) -> None:
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry in changed:
            continue
        if entry.name == "__pycache__":  # linked one by one: what is compiled of the fork must not land in there
            (target / entry.name).mkdir()
            for compiled in entry.iterdir():
                if entry.parent / f"{compiled.name.partition('.')[0]}.py" not in changed:
                    (target / entry.name / compiled.name).symlink_to(compiled)
            continue
        if entry.is_dir() and any(path.is_relative_to(entry) for path in changed):
            _link(entry, target / entry.name, changed)
        else:
            (target / entry.name).symlink_to(entry)


def _salts_noted(engine: Engine) -> list[bool]:
    """Whether a request with a ``cache_salt`` is known to be private, and one without."""
    scheduler, requests = engine.scheduler, []
    add = scheduler.add_request
    scheduler.add_request = lambda request: (add(request), requests.append(request))
    prompt = {"prompt_token_ids": [1, 2, 3]}
    engine.llm.generate([prompt | {"cache_salt": "salt"}, prompt], use_tqdm=False)
    return [is_private(request.sampling_params) for request in requests]


def _serve(target: Path, scratch: Path) -> None:
    import vllm

    from benchmarks.engine import Engine
    from tests.integration.reference import count_verdicts
    from tests.integration.served import answers_to_what_vllm_refuses

    engine = Engine.start(target, scratch, worker_cls="auto", scheduler_cls=None)
    try:
        before = engine.spec_decode_counters()
        engine.generate(["The capital of France is", "1 2 3 4 5 6 7 8", "Once upon a time"], max_tokens=16)
        engine.let_requests_end()
        rows, after = engine.drain(), engine.spec_decode_counters()
        worker = engine.llm.llm_engine.model_executor.driver_worker.worker
        found = {
            "vllm": vllm.__file__,
            "classes": [type(worker).__name__, type(engine.scheduler).__name__],
            "wrapped": [name for name in ("sample_tokens", "_sample") if name in vars(worker.model_runner)],
            "rows": count_verdicts(rows, engine.session.row_layout),
            "vllm_counts": {name: after[name] - before[name] for name in ("drafts", "draft_tokens", "accepted_tokens")},
            "errors": engine.control.worker.capture_errors,
            "steps": [engine.control.worker.step, engine.control.scheduler.steps],
            "biased": answers_to_what_vllm_refuses(engine, [[1, 2, 3]], {"logit_bias": {BIASED: 100}})[0],
            "noted": _salts_noted(engine),
            "forgets_cached_prompts": engine.scheduler.speculation_advisor._cached_prompts is not None,
        }
    finally:
        engine.close()
    print(json.dumps(found))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
