"""The front door: which vLLM runs with which arguments, and what bad input answers. vLLM itself is a stand-in here."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints, version
from pathlib import Path
from typing import Any

import pytest

from aurora_vllm import checkpoint, cli, entrypoint, models, plan, preflight, resuming, vllm_server
from aurora_vllm.checkpoint import Target
from aurora_vllm.errors import AuroraError
from aurora_vllm.session import ENVIRONMENT_KEY, PLAIN_KEY, why_plain
from aurora_vllm.spec_decode import compat
from aurora_vllm.spec_decode.compat import Probe
from aurora_vllm.spec_decode.model_runner import ModelRunner
from aurora_vllm.supervisor import SAVE_S
from tests.unit.plan_world import draft_dir, serve_plan, target
from tests.unit.vllm_arguments import ARGS

__all__ = ["draft_dir", "serve_plan", "target"]  # fixtures


class FakeServer:
    """vLLM's command line, without vLLM."""

    version = "9.9.9"
    argv: list[str]
    ran: dict[str, Any] | None

    def __init__(self) -> None:
        type(self).ran = None

    def parse(self, argv: list[str]) -> Namespace:
        type(self).argv = list(argv)
        return Namespace(**ARGS)

    def run(self, args: Namespace) -> None:
        type(self).ran = dict(vars(args))


class FakeGuard:
    number: int | None = None
    grace_s = 0.0
    exit_code = 143

    def leave(self, code: int) -> None:
        pass


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("AURORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv(PLAIN_KEY, "")  # so that it is put back
    monkeypatch.setattr(vllm_server, "VllmServer", FakeServer)
    monkeypatch.setattr(entrypoint, "StopGuard", FakeGuard)  # the real one changes this process's signal handlers
    monkeypatch.setattr(entrypoint, "end_descendants", lambda: None)
    monkeypatch.setattr(compat, "probe", lambda hooks: [Probe("a:b", True, "the tested source")])
    yield


def test_off_is_vllm_with_its_own_arguments() -> None:
    assert entrypoint.main(["serve", "M", "--port", "3", "--aurora-off", "--aurora-seed=3"]) == 0
    assert FakeServer.argv == ["M", "--port", "3"]
    assert FakeServer.ran == ARGS
    assert os.environ["VLLM_PLUGINS"] == "" == why_plain()  # nothing of ours: /aurora/status is a 404


def test_an_unknown_vllm_is_served_plain(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(
        compat, "probe", lambda hooks: [Probe("a:b", True, "fits"), Probe("c:d", False, "not in this vLLM")]
    )
    monkeypatch.setenv(ENVIRONMENT_KEY, "of a server that started this one")
    assert entrypoint.main(["M"]) == 0
    assert FakeServer.ran == ARGS
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("WARNING ") and error.endswith(
        " aurora: vLLM 9.9.9 does not fit (c:d: not in this vLLM); serving it plain, without learning"
    )
    # For /aurora/status, which answers 503 with the reason.
    assert os.environ["VLLM_PLUGINS"] == "aurora" and ENVIRONMENT_KEY not in os.environ
    assert why_plain() == "vLLM 9.9.9 does not fit (c:d: not in this vLLM)"


def test_a_choice_of_runner_that_vllm_would_end_on(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert entrypoint.main(["M"]) == 2
    assert capfd.readouterr().err == (
        "aurora_vllm: error: VLLM_USE_V2_MODEL_RUNNER=1, and there is no Triton for this device; "
        "unset VLLM_USE_V2_MODEL_RUNNER: V1 needs none\n"
    )
    assert FakeServer.ran is None


def test_a_vllm_of_another_layout_is_run_as_a_program(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    class Elsewhere:
        def __init__(self) -> None:
            raise vllm_server.UnknownLayout("ImportError: no module")

    ran: list[list[str]] = []

    def run_as_program(argv: list[str]) -> None:
        ran.append(argv)
        raise SystemExit(0)

    monkeypatch.setattr(vllm_server, "VllmServer", Elsewhere)
    monkeypatch.setattr(vllm_server, "run_as_program", run_as_program)
    with pytest.raises(SystemExit):
        entrypoint.main(["M", "--port=3"])
    assert ran == [["M", "--port=3"]]
    assert "serving it plain" in capfd.readouterr().err
    assert entrypoint.main(["M", "--aurora-plan"]) == 2


class Stage:
    """All that ``_serve`` calls, as stand-ins that say in which order they were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, planned: plan.ServePlan) -> None:
        self.calls: list[str] = []
        self.runtime: tuple[Any, ...] = ()
        calls, stage = self.calls, self

        class Runtime:
            def __init__(self, made: plan.ServePlan, told_when_up: bool) -> None:
                stage.runtime = made, told_when_up
                calls.append("memory")

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None:
                calls.append("memory goes")

        def run(server: FakeServer, args: Namespace) -> None:
            calls.append("serve")
            self.args = args

        monkeypatch.setattr(entrypoint, "_plan", lambda *_: planned)
        monkeypatch.setattr(preflight, "check_port", lambda args: calls.append("port"))
        monkeypatch.setattr(resuming, "check_checkpoint_dir", lambda config: calls.append("checkpoint directory"))
        monkeypatch.setattr(models, "make_draft", lambda draft, *_: calls.append("draft") or draft)
        monkeypatch.setattr("aurora_vllm.runtime.Runtime", Runtime)
        monkeypatch.setattr(FakeServer, "run", run)
        monkeypatch.setattr(entrypoint, "end_descendants", lambda: calls.append("processes end"))
        monkeypatch.setattr(vllm_server, "routes_are_installed", lambda: True)
        self.takes_runner(monkeypatch, "V1")

    def takes_runner(self, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
        monkeypatch.setattr(entrypoint, "_probes", lambda: (ModelRunner(name, "a test said so"), ()))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, serve_plan: plan.ServePlan) -> Stage:
    return Stage(monkeypatch, serve_plan)


def test_what_can_be_wrong_is_looked_at_before_anything_is_made(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert entrypoint.main(["M"]) == 0
    assert stage.calls == [
        "port", "checkpoint directory", "draft", "memory", "serve", "memory goes", "processes end"
    ]  # fmt: skip
    assert (stage.args.worker_cls, stage.args.scheduler_cls) == (preflight.WORKER_CLASS, preflight.SCHEDULER_CLASS)
    assert stage.args.speculative_config["method"] == "eagle3"
    assert os.environ["VLLM_PLUGINS"] == "aurora"  # vLLM lets our routes in
    made, told_when_up = stage.runtime
    assert made.model_runner.name == "V1" and told_when_up


def test_a_plan_counts_copies_and_shows_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, target: Target, draft_dir: Path
) -> None:
    """Through everything between the command line and what is printed; for a GPU, because there they take memory."""
    draft = checkpoint.read_draft(draft_dir, target)
    monkeypatch.setattr(models, "resolve_target", lambda *_, **__: target)
    monkeypatch.setattr(models, "resolve_draft", lambda *_: draft)
    monkeypatch.setattr(entrypoint, "_probes", lambda: (ModelRunner("V2", "a test said so"), ()))
    monkeypatch.setattr(preflight, "gpu_total_bytes", lambda: 80 << 30)
    monkeypatch.setattr(preflight, "host_total_bytes", lambda: None)
    monkeypatch.setattr(preflight, "free_bytes", lambda: 1 << 20)
    monkeypatch.setitem(ARGS, "gpu_memory_utilization", 0.9)
    monkeypatch.setitem(ARGS, "max_num_seqs", 64)
    assert entrypoint.main(["M", "--aurora-plan=json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["speculation"]["copied_tokens"] == 8
    memory = shown["memory"]
    assert memory["gpu"]["parts"]["copies"] > 0 and memory["gpu"]["parts"]["logits"] == 64 * 8 * target.vocab_size * 4
    assert entrypoint.main(["M"]) == 2
    wanted = f"ring and bank want {memory['shared_bytes'] / 2**20:.0f} MiB of shared memory, and /dev/shm has 1 free"
    assert wanted in capfd.readouterr().err and FakeServer.ran is None


def test_what_starts_is_said_before_it_starts(
    stage: Stage, serve_plan: plan.ServePlan, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def no_room(*_: Any) -> None:
        raise AuroraError("no room in shared memory")

    untested = Probe("c:d", True, "fits, but this version was never tested", tested=False)
    monkeypatch.setattr(entrypoint, "_plan", lambda *_: replace(serve_plan, probes=(untested,)))
    monkeypatch.setattr("aurora_vllm.runtime.Runtime", no_room)
    assert entrypoint.main(["M"]) == 2
    said, warning, error = capfd.readouterr().err.splitlines()
    assert said.startswith("INFO ") and f" aurora: aurora_vllm {version('aurora-vllm')} on vLLM " in said
    assert said.endswith("; GET /aurora/status says how it goes")
    assert warning.startswith("WARNING ") and "c:d fits, but this version was never tested" in warning
    assert error == "aurora_vllm: error: no room in shared memory"


def test_whatever_ends_the_server_its_processes_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeServer, args: Namespace) -> None:
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(FakeServer, "run", fail)
    with pytest.raises(RuntimeError):
        entrypoint.main(["M"])
    assert stage.calls[-2:] == ["memory goes", "processes end"]


def test_what_the_system_refuses_is_bad_input(stage: Stage, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Not readable for this user, most likely: a model, a cache, a checkpoint."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), ARGS["model"])

    monkeypatch.setattr(models, "make_draft", refuse)
    assert entrypoint.main(["M"]) == 2
    assert capfd.readouterr().err == f"aurora_vllm: error: {ARGS['model']}: Permission denied\n"
    assert "serve" not in stage.calls


@pytest.mark.parametrize(
    ("installed", "api_servers", "told"), [(True, None, True), (True, 1, True), (True, 2, False), (False, None, False)]
)
def test_the_learner_waits_for_the_plugin_where_it_is_in_this_process(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capfd: Any, installed: bool, api_servers: int | None, told: bool
) -> None:
    monkeypatch.setitem(ARGS, "api_server_count", api_servers)
    monkeypatch.setattr(vllm_server, "routes_are_installed", lambda: installed)
    assert entrypoint.main(["M"]) == 0
    assert stage.runtime[1] == told
    assert ("not installed as a package" in capfd.readouterr().err) != installed


@pytest.mark.parametrize(
    ("argv", "drain", "grace"), [([], 0, 0.0), ([], 30, 30.0), (["--aurora-checkpoint-dir=/c"], 30, 30.0 + SAVE_S)]
)
def test_a_stop_leaves_time_for_requests_to_end_and_a_checkpoint_to_be_saved(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, argv: list[str], drain: int, grace: float
) -> None:
    made: list[FakeGuard] = []

    class Guard(FakeGuard):
        def __init__(self) -> None:
            made.append(self)

    monkeypatch.setattr(entrypoint, "StopGuard", Guard)
    monkeypatch.setitem(ARGS, "shutdown_timeout", drain)
    assert entrypoint.main(["M", *argv]) == 0
    assert made[0].grace_s == grace


def test_the_command_says_its_versions(capsys: Any) -> None:
    assert cli.main(["--version"]) == 0
    said = capsys.readouterr().out
    assert f"aurora-vllm {version('aurora-vllm')}" in said and "vllm" in said.replace("aurora-vllm", "")


def test_what_is_not_supported_is_not_begun(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setitem(ARGS, "tensor_parallel_size", 2)
    assert entrypoint.main(["M"]) == 2
    assert "Aurora does not support --tensor-parallel-size 2 yet" in capfd.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(capfd: Any) -> None:
    assert entrypoint.main(["M"]) == 2
    assert capfd.readouterr().err == (
        "aurora_vllm: error: model /nowhere/model does not exist; "
        "give a directory, or a model on the Hugging Face hub (owner/name)\n"
    )
    assert FakeServer.ran is None


def test_a_fault_after_a_stop_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeServer, args: Namespace) -> None:
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(FakeServer, "run", fail)
    with pytest.raises(RuntimeError):
        entrypoint.main(["M", "--aurora-off"])
    left: list[int] = []
    monkeypatch.setattr(FakeGuard, "leave", lambda self, code: left.append(code))
    monkeypatch.setattr(FakeGuard, "number", 15)
    assert entrypoint.main(["M", "--aurora-off"]) == 143
    assert left == [143]  # not through the interpreter's own end, where vLLM may hang


@pytest.mark.parametrize(("argv", "tag", "served"), [([], None, ["T"]), (["M"], "M", ["M"])])
def test_an_aurora_file_names_the_model_where_nobody_does(
    argv: list[str], tag: str | None, served: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARGS, "model_tag", tag)
    (tmp_path / "a.yaml").write_text("{model: {target_model_path: T}, decode: {max_running_requests: 4}}")
    assert entrypoint.main([*argv, "--aurora-config", str(tmp_path / "a.yaml")]) == 2  # no such model
    assert FakeServer.argv == [*served, "--max-num-seqs", "4"]


@pytest.mark.parametrize("argv", [["--aurora-rng-mb", "3", "M"], ["--aurora-help"]])
def test_our_own_errors_and_help_come_without_importing_vllm_or_torch(argv: list[str]) -> None:
    code = (
        "import sys; from aurora_vllm.entrypoint import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AURORA_")}
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=environment)
    if argv == ["--aurora-help"]:
        assert (done.returncode, done.stderr) == (0, "")
        assert "--aurora-ring-mb" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr == "aurora_vllm: error: unknown option --aurora-rng-mb; the nearest is --aurora-ring-mb\n"


@pytest.mark.parametrize(
    ("given", "hoisted"),
    [
        (["M", "--port", "3"], ["M", "--port", "3"]),
        (["--port", "3", "--model", "M", "-x"], ["M", "--port", "3", "-x"]),
        (["--port", "3", "--model=M"], ["M", "--port", "3"]),
        (["--model"], ["--model"]),  # vLLM says what is missing
        ([], []),
    ],
)
def test_the_model_comes_first(given: list[str], hoisted: list[str]) -> None:
    assert vllm_server.hoist_model(given) == hoisted


def test_the_plugin_is_let_in_and_no_other_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        [
            EntryPoint("lora", "m:f", "vllm.general_plugins"),
            EntryPoint("lora_hf_hub_resolver", "m:f", "vllm.general_plugins"),  # to name it is to let it download
            EntryPoint("mine", "m:f", "vllm.platform_plugins"),
            EntryPoint("others", "m:f", "vllm.endpoint_plugins"),
            EntryPoint("aurora", "m:f", "vllm.endpoint_plugins"),
            EntryPoint("script", "m:f", "console_scripts"),
        ]
    )
    monkeypatch.setattr(vllm_server, "entry_points", lambda: points)
    assert vllm_server.allow_plugin({}) == "lora,mine,aurora"
    assert vllm_server.allow_plugin({"VLLM_PLUGINS": "lora"}) == "lora,aurora"
    assert vllm_server.allow_plugin({"VLLM_PLUGINS": "lora_hf_hub_resolver"}) == "lora_hf_hub_resolver,aurora"
    assert vllm_server.allow_plugin({"VLLM_PLUGINS": "aurora,lora"}) == "aurora,lora"
    assert vllm_server.allow_plugin({"VLLM_PLUGINS": ""}) == "aurora"
