"""Writes dashboards/grafana.json: ``python -m tools.dashboard``.

Two groups of panels, on serving and on learning, from vLLM's own metrics and ours, for any number of servers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parent.parent / "dashboards" / "grafana.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3  # of a panel, in Grafana's grid of 24 columns


@dataclass(frozen=True)
class Panel:
    """One panel. ``series``: PromQL by legend, where ``{}`` selects the servers."""

    title: str
    description: str
    series: Mapping[str, str]
    unit: str = "none"
    kind: str = "timeseries"


def per_second(metric: str) -> str:
    """A counter's rate."""
    return f"rate({metric}{{}}[$__rate_interval])"


def quotient(above: str, below: str) -> str:
    """The rate of one counter for each of another; nothing while the other stands still."""
    return f"{per_second(above)} / ({per_second(below)} > 0)"


SERVING = (
    Panel(
        "State",
        "1: Aurora serves, the worker swaps and captures, the learner is alive",
        {"serves": "aurora_up{}", "worker": "aurora_worker_attached{}", "learner": "aurora_learner_alive{}"},
        kind="stat",
    ),
    Panel(
        "Tokens",
        "Generated tokens, and which of them were proposals that the target accepted",
        {
            "generated": f"sum by (instance) ({per_second('vllm:generation_tokens_total')})",
            "accepted from copies": per_second("aurora_copied_accepted_tokens_total"),
            "accepted from the draft": per_second("aurora_accepted_tokens_total"),
        },
        "cps",
    ),
    Panel(
        "Time per output token",
        "As users see it",
        {
            f"p{quantile:g}": f"histogram_quantile({quantile / 100:g}, sum by (instance, le) "
            f"({per_second('vllm:request_time_per_output_token_seconds_bucket')}))"
            for quantile in (50, 99)
        },
        "s",
    ),
    Panel(
        "Acceptance length",
        "Tokens gained by a verification, the target's own included",
        {
            "copies": f"1 + {quotient('aurora_copied_accepted_tokens_total', 'aurora_copied_drafts_total')}",
            "draft, {{version}}": "aurora_acceptance_length{}",
        },
    ),
    Panel(
        "Draft length K, and steps with proposals",
        "K is 0 where drafting does not pay; copies may be proposed all the same",
        {
            "K": "aurora_draft_length{}",
            "share of steps that verify proposals": quotient("aurora_speculative_steps_total", "aurora_steps_total"),
        },
    ),
    Panel(
        "Versions of the draft",
        "A version is published, goes live, and is rolled back if it accepts clearly less",
        {
            "live": "aurora_draft_version_live{}",
            "published": "aurora_draft_version_published{}",
            "rolled back": "aurora_rollbacks_total{}",
            "refused": "aurora_swap_refusals_total{}",
        },
    ),
)
LEARNING = (
    Panel(
        "Requests to learn from",
        "Dropped: the ring was full. Opted out: by the client, or of one token",
        {
            "captured": per_second("aurora_requests_captured_total"),
            "dropped": per_second("aurora_requests_dropped_total"),
            "opted out": per_second("aurora_requests_opted_out_total"),
        },
        "reqps",
    ),
    Panel(
        "Trace ring",
        "Rows that the learner has not read yet, as a share of the ring",
        {"full": "aurora_ring_used_rows{} / aurora_ring_capacity_rows{}"},
        "percentunit",
    ),
    Panel(
        "The learner's CPUs",
        "What it uses. On an idle server it may use one whole CPU",
        {"used": per_second("aurora_learner_cpu_seconds_total"), "asleep": "aurora_learner_asleep{}"},
    ),
    Panel(
        "Simulated acceptance length",
        "On requests before they are trained on: of the draft in training, and of the live one",
        {
            "in training": "aurora_candidate_acceptance_length{}",
            "live": "aurora_incumbent_acceptance_length{}",
        },
    ),
    Panel(
        "Tokens trained on",
        "Seen: all that was captured. Trained: in optimizer steps, repeats included",
        {
            "seen": per_second("aurora_learner_tokens_seen_total"),
            "trained": per_second("aurora_learner_tokens_trained_total"),
        },
        "cps",
    ),
    Panel(
        "Draft vocabulary",
        "Share of the target's recent tokens that the live draft can propose",
        {"coverage": "aurora_vocabulary_coverage{}"},
        "percentunit",
    ),
)


def dashboard() -> dict[str, Any]:
    """The whole dashboard, in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, group in (("Serving", SERVING), ("Learning", LEARNING)):
        place = {"x": 0, "y": top, "w": WIDTH * COLUMNS, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        for i, panel in enumerate(group):
            row, column = divmod(i, COLUMNS)
            place = {"x": WIDTH * column, "y": top + 1 + HEIGHT * row, "w": WIDTH, "h": HEIGHT}
            panels.append(_in_grafana(panel, len(panels) + 1, place))
        top += 1 + HEIGHT * -(-len(group) // COLUMNS)
    return {
        "title": "aurora_vllm",
        "uid": "aurora-vllm",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_choose_source(), _choose_instance()]},
        "panels": panels,
    }


def _in_grafana(panel: Panel, number: int, place: Mapping[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": SOURCE,
            "expr": expression.replace("{}", '{instance=~"$instance"}'),
            "legendFormat": f"{legend} ({{{{instance}}}})",
        }
        for i, (legend, expression) in enumerate(panel.series.items())
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": dict(place),
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}} if panel.kind == "stat" else {},
    }


def _choose_source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _choose_instance() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "server",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(aurora_up, instance)", "refId": "instance"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


if __name__ == "__main__":
    DASHBOARD.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
