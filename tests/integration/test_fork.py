"""patches/vllm-VERSION.patch: it applies to the installed sources, and the fork it makes captures as the wraps do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aurora_vllm.spec_decode.vllm_sources import VllmSources
from tests.integration.forked_vllm import BIASED, make_fork, touched
from tests.integration.paths import REPOSITORY, python_path


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fork(tmp_path_factory.mktemp("fork"), VllmSources.installed().where)


def test_every_touched_file_compiles_and_no_other_is_touched(fork: Path) -> None:
    assert sorted(touched()) == [
        "vllm/v1/core/sched/scheduler.py",
        "vllm/v1/worker/cpu_worker.py",
        "vllm/v1/worker/gpu_model_runner.py",
        "vllm/v1/worker/gpu_worker.py",
    ]
    for name in touched():
        compile((fork / name).read_text(), name, "exec")


@pytest.mark.parametrize(
    ("symbol", "call"),
    [
        ("vllm.v1.worker.gpu_worker:Worker.load_model", "aurora.attach"),
        ("vllm.v1.worker.gpu_worker:Worker.execute_model", "self.aurora_attachment.step_starts"),
        ("vllm.v1.worker.gpu_worker:Worker.shutdown", "self.aurora_attachment.close"),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens", "self.step_observer.sampled"),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids", "self.step_observer.proposing"),
        ("vllm.v1.core.sched.scheduler:Scheduler.__init__", "aurora.advise"),
        ("vllm.v1.core.sched.scheduler:Scheduler.add_request", "self.speculation_advisor.request_arrives"),
        ("vllm.v1.core.sched.scheduler:Scheduler.schedule", "self.speculation_advisor.step_starts"),
        ("vllm.v1.core.sched.scheduler:Scheduler.update_from_output", "self.speculation_advisor.step_ends"),
        ("vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids", "self.speculation_advisor.drafts_arrived"),
        ("vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats", "self.speculation_advisor.verified"),
    ],
)
def test_the_hook_points_are_there(fork: Path, symbol: str, call: str) -> None:
    source = VllmSources(fork).source(symbol)
    indent = len(source) - len(source.lstrip())
    tree = ast.parse("\n".join(line[indent:] for line in source.splitlines()))
    assert call in [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_fork_captures_without_our_worker_and_scheduler(fork: Path, target: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.forked_vllm", str(target), str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": python_path(fork)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["vllm"].startswith(str(fork))
    assert found["classes"] == ["CPUWorker", "Scheduler"]
    assert found["wrapped"] == []  # its own calls do it
    assert found["errors"] == 0
    assert found["rows"]["drafts"] > 5
    assert {name: found["rows"][name] for name in found["vllm_counts"]} == found["vllm_counts"]
    assert min(found["steps"]) > 5
    assert set(found["biased"]) == {BIASED}
    assert found["noted"] == [True, False]
    assert found["forgets_cached_prompts"]
