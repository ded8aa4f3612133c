"""A fork of vLLM as a person would keep it: the installed one under patches/vllm-VERSION.patch, in its own directory.

Run as a program it serves a few requests with that fork, plain worker and scheduler, and prints what was captured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from aurora_vllm.spec_decode.vllm_sources import VllmSources

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
        if entry in changed or entry.name == "__pycache__":
            continue
        if entry.is_dir() and any(path.is_relative_to(entry) for path in changed):
            _link(entry, target / entry.name, changed)
        else:
            (target / entry.name).symlink_to(entry)


def _serve(target: Path, scratch: Path) -> None:
    import vllm

    from benchmarks.engine import Engine
    from tests.integration.reference import count_verdicts

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
        }
    finally:
        engine.close()
    print(json.dumps(found))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
