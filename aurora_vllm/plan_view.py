"""A plan as text: for ``--aurora-plan``, and for the log at start."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.memory import MIB
from aurora_vllm.plan import ServePlan
from aurora_vllm.transport.segment import SHM, free_bytes
from aurora_vllm.versions import own_version


def show(plan: ServePlan, style: str) -> None:
    """Print the plan to stdout: a table on a terminal, plain lines elsewhere, JSON for style "json"."""
    if style == "json":
        print(json.dumps(as_dict(plan), indent=2))
        return
    if not sys.stdout.isatty():
        for name, value in _lines(plan):
            print(f"{name:<16}{value}")
        return
    table = Table(title="aurora_vllm would run", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _lines(plan):
        table.add_row(name, value)
    Console().print(table)


def in_one_line(plan: ServePlan) -> str:
    """The plan as one line, for the log at start."""
    parts = [
        f"aurora_vllm {own_version() or 'of a checkout'} on vLLM {plan.vllm_version}, "
        f"model runner {plan.model_runner.name}",
        f"{plan.draft.origin.partition(',')[0]} draft {plan.draft.directory}",
        _speculation(plan),
        _learner(plan),
    ]
    if (share := plan.gpu or plan.host) is not None:
        parts.append(share.why)
    return "; ".join(parts)


def untested(plan: ServePlan) -> str:
    """A warning that the tests have not run this vLLM, or parts of it; "" where they have."""
    new = [probe for probe in plan.probes if probe.ok and not probe.tested]
    if not new:
        return ""
    return (
        f"vLLM {plan.vllm_version}: {len(new)} of {len(plan.probes)} wrapped parts are not the tested ones "
        f"({new[0].name} {new[0].detail}); aurora-vllm check-vllm compares all of them"
    )


def as_dict(plan: ServePlan) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "vllm_version": plan.vllm_version,
        "serves": "aurora" if plan.fits else "plain vLLM",
        "model_runner": asdict(plan.model_runner),
        "model": plan.target.model,
        "target": {
            "directory": str(plan.target.directory),
            "hidden_size": plan.target.hidden_size,
            "layers": plan.target.num_layers,
            "vocab_size": plan.target.vocab_size,
            "dtype": plan.target.dtype,
        },
        "draft": {
            "directory": str(plan.draft.directory),
            "origin": plan.draft.origin,
            "aux_layers": list(plan.draft.aux_layers),
            "draft_vocab_size": plan.draft.vocab_size,
            "parameters": plan.draft.num_parameters,
        },
        "speculation": {
            "num_speculative_tokens": plan.config.num_speculative_tokens,
            "speculate": plan.config.speculate,
            "copied_tokens": plan.copied_tokens,
        },
        "memory": {
            "row_bytes": plan.layout.row_bytes,
            "ring_rows": plan.ring_rows,
            "ring_bytes": plan.ring_bytes,
            "bank_bytes": plan.bank_bytes,
            "shared_bytes": plan.shared_bytes,
            "kv_bytes_per_token": {"draft": plan.draft_kv_bytes, "target": plan.target_kv_bytes},
            "replay_bytes": plan.config.replay_mb * MIB,
            "learner_peak_bytes": plan.learner.total if plan.config.learn else 0,
            "learner_peak": asdict(plan.learner) if plan.config.learn else {},
            "gpu": plan.gpu.as_dict() if plan.gpu else None,
            "host": plan.host.as_dict() if plan.host else None,
        },
        "settings": plan.config.model_dump(mode="json"),
        "aurora_file": plan.aurora_file.as_dict() if plan.aurora_file else None,
        "hooks": [{"name": probe.name, "ok": probe.ok, "detail": probe.detail} for probe in plan.probes],
    }


def _lines(plan: ServePlan) -> Iterator[tuple[str, str]]:
    config, target, draft = plan.config, plan.target, plan.draft
    yield "vLLM", plan.vllm_version
    yield "model runner", f"{plan.model_runner.name} ({plan.model_runner.reason})"
    yield (
        "model",
        f"{target.model} ({target.num_layers} layers, hidden {target.hidden_size}, vocabulary {target.vocab_size})",
    )
    yield "dtype", target.dtype
    yield "draft", f"{draft.origin}: {draft.directory}"
    yield "", f"{draft.num_parameters / 1e6:.1f}M parameters, vocabulary {draft.vocab_size}"
    yield "aux layers", ", ".join(map(str, draft.aux_layers))
    yield "speculation", _speculation(plan)
    yield "trace ring", f"{plan.ring_bytes / MIB:.1f} MiB ({plan.ring_rows} rows of {plan.layout.row_bytes} bytes)"
    yield "weight bank", f"{plan.bank_bytes / MIB:.1f} MiB (three slots)"
    free = free_bytes()
    room = "" if free is None else f", and {SHM} has {free / MIB:.0f} free"
    yield "shared memory", f"{plan.shared_bytes / MIB:.0f} MiB for both{room}"
    yield "KV cache", _kv_cache(plan)
    yield "replay", f"{config.replay_mb} MiB"
    if config.learn:
        parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in asdict(plan.learner).items())
        yield "learner's peak", f"{plan.learner.total / MIB:.0f} MiB, besides ring and bank ({parts})"
    if plan.gpu is not None:
        yield "GPU", plan.gpu.why
        parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in asdict(plan.gpu.memory).items())
        yield "", f"{parts} of {plan.gpu.total / MIB:.0f} MiB"
    if plan.host is not None:
        yield "host memory", plan.host.why
    default = AuroraConfig()
    given = [f"{name}={value}" for name, value in config if value != getattr(default, name)]
    yield "settings", " ".join(given) or "all defaults"
    misfits = [probe for probe in plan.probes if not probe.ok]
    yield (
        "hooks",
        f"{len(plan.probes) - len(misfits)} of {len(plan.probes)} fit" + (": serves plain vLLM" if misfits else ""),
    )
    for probe in plan.probes:
        yield "", f"{'ok  ' if probe.ok else 'MISS'} {probe.name}: {probe.detail}"
    if plan.aurora_file is not None:
        yield "Aurora's file", str(plan.aurora_file.file)
        for entry in plan.aurora_file.entries:
            yield "", f"{'ok  ' if entry.honoured else 'NOT '} {entry.key}: {entry.what}"


def _speculation(plan: ServePlan) -> str:
    copies = f"up to {plan.copied_tokens} copied tokens" if plan.copied_tokens else "no copied tokens"
    return f"K up to {plan.config.num_speculative_tokens}, {copies}, {plan.config.speculate}"


def _learner(plan: ServePlan) -> str:
    if not plan.config.learn:
        return "no learner"
    on_gpu = plan.gpu is not None and plan.gpu.used
    share = f"{100 * plan.config.learner_cpu_share:g}%"
    return f"learner on the GPU with at most {share} of it" if on_gpu else f"learner on at most {share} of a CPU"


def _kv_cache(plan: ServePlan) -> str:
    draft, target = plan.draft_kv_bytes, plan.target_kv_bytes
    share = (
        "" if target is None else f" beside the target's {target / 1024:.1f} ({draft / (draft + target):.0%} of all)"
    )
    return f"{draft / 1024:.1f} KiB a token for the draft{share}"
