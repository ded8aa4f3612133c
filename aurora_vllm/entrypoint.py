"""The front door: ``python -m aurora_vllm.entrypoint MODEL`` is ``vllm serve MODEL`` with a speculator that learns.

Kept light at import: vLLM's spawned processes import this module again as their main module.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aurora_vllm import settings
from aurora_vllm.errors import AuroraError, notice, one_line_for_os_errors, report
from aurora_vllm.settings import Invocation
from aurora_vllm.speculative_config import take_speculative_config
from aurora_vllm.stopping import StopGuard, end_descendants
from aurora_vllm.supervisor import SAVE_S

if TYPE_CHECKING:
    from aurora_vllm.plan import ServePlan
    from aurora_vllm.spec_decode.compat import Probe
    from aurora_vllm.spec_decode.model_runner import ModelRunner
    from aurora_vllm.vllm_server import VllmServer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; the exit code. Bad input is one line on stderr and 2."""
    guard = StopGuard()
    try:
        code = _main(settings.parse(sys.argv[1:] if argv is None else argv, os.environ), guard)
    except AuroraError as error:
        code = report(error)
    except BaseException:
        if guard.number is None:
            raise
        code = guard.exit_code  # it was stopped while it started: what vLLM raised then is of no interest
    guard.leave(code)
    return code


def _main(invocation: Invocation, guard: StopGuard) -> int:
    wants_help = any(word in ("-h", "--help") or word.startswith("--help=") for word in invocation.vllm_argv)
    if invocation.help or wants_help:
        print(settings.parser().format_help())
        if invocation.help:
            return 0

    if invocation.plan:  # stdout is for the plan; vLLM's log would go there too
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from aurora_vllm import vllm_server

    try:
        server = vllm_server.VllmServer()
    except vllm_server.UnknownLayout as error:
        if invocation.plan:
            raise AuroraError(
                f"this vLLM keeps its server elsewhere ({error})", "it can only be served plain"
            ) from None
        if not invocation.off:
            notice(f"this vLLM keeps its server elsewhere ({error}); serving it plain, without learning", "WARNING")
        vllm_server.run_as_program(invocation.vllm_argv)
    args = server.parse(invocation.vllm_argv)
    if invocation.aurora_file is not None and invocation.aurora_file.model and getattr(args, "model_tag", None) is None:
        args = server.parse([invocation.aurora_file.model, *invocation.vllm_argv])
    guard.grace_s += getattr(args, "shutdown_timeout", 0)  # time vLLM gives requests to finish
    if invocation.config.checkpoint_dir is not None:
        guard.grace_s += SAVE_S
    try:
        if invocation.off:
            server.run(args)
            return 0
        return _serve(invocation, server, args)
    finally:
        end_descendants()


def _serve(invocation: Invocation, server: VllmServer, args: Namespace) -> int:
    from aurora_vllm import models, plan_view, preflight, resuming, session, vllm_server
    from aurora_vllm import plan as plans
    from aurora_vllm.runtime import Runtime

    os.environ["VLLM_PLUGINS"] = vllm_server.allow_plugin(os.environ)  # first: plain serving has a status route, too
    runner, probes = _probes()
    misfits = [probe for probe in probes if not probe.ok]
    if misfits and not invocation.plan:
        reason = f"vLLM {server.version} does not fit ({misfits[0].name}: {misfits[0].detail})"
        notice(f"{reason}; serving it plain, without learning", "WARNING")
        session.export_plain(reason)
        server.run(args)
        return 0

    with one_line_for_os_errors():
        plan = _plan(invocation, server, args, runner, probes)
        if invocation.plan:
            plan_view.show(plan, invocation.plan)
            return 0
        preflight.check_shared_memory(plan.shared_bytes)
        for line in plan.aurora_file.summary() if plan.aurora_file else ():
            notice(line)
        preflight.check_port(args)
        resuming.check_checkpoint_dir(plan.config)
        plan = replace(plan, draft=models.make_draft(plan.draft, plan.target, plan.config))
    plans.apply(plan, args, _speculative_fields())
    installed = vllm_server.routes_are_installed()
    notice(f"{plan_view.in_one_line(plan)}{'; GET /aurora/status says how it goes' * installed}")
    if warning := plan_view.untested(plan):
        notice(warning, "WARNING")
    if not installed:
        missing = "no /aurora/status, no metrics, no min_p and logit_bias (pip install -e .)"
        notice(f"not installed as a package: {missing}", "WARNING")
    api_servers = getattr(args, "api_server_count", None) or 1  # several have processes of their own
    with Runtime(plan, installed and api_servers == 1):
        server.run(args)
    return 0


def _speculative_fields() -> frozenset[str]:
    from aurora_vllm.spec_decode import compat

    return compat.fields_of("vllm.config:SpeculativeConfig")


def _plan(
    invocation: Invocation, server: VllmServer, args: Namespace, runner: ModelRunner, probes: tuple[Probe, ...]
) -> ServePlan:
    from aurora_vllm import memory_plan, models, preflight
    from aurora_vllm import plan as plans

    preflight.check_supported(args, invocation.config)
    config = take_speculative_config(args, invocation.config, invocation.explicit)
    target = models.resolve_target(args, weights=not invocation.plan)
    total = preflight.gpu_total_bytes()
    rows = memory_plan.least_rows_on_gpu(args) if total is not None else 0
    draft = models.resolve_draft(config, target, (args.speculative_config or {}).get("revision"))
    plan = plans.make_plan(config, args, server.version, target, draft, runner, probes, rows)
    preflight.check_kv_cache(plan, args)
    gpu = memory_plan.plan_gpu(plan, args, total) if total is not None else None
    memory = preflight.host_total_bytes()
    host = memory_plan.plan_host(plan, args, memory) if memory is not None else None
    return replace(plan, aurora_file=invocation.aurora_file, gpu=gpu, host=host)


def _probes() -> tuple[ModelRunner, tuple[Probe, ...]]:
    from aurora_vllm.spec_decode import compat, hooks, model_runner

    runner = model_runner.choose_runner()
    return runner, tuple(compat.probe(hooks.hooks_of(runner.name)))


if __name__ == "__main__":
    sys.exit(main())
