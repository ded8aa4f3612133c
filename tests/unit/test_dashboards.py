"""Dashboard and alerts use metrics that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from aurora_vllm.server.metrics import METRICS
from tools.dashboard import DASHBOARD, dashboard

OURS = {metric.name: metric.kind for metric in METRICS}
VLLMS = {"vllm:generation_tokens_total", "vllm:request_time_per_output_token_seconds_bucket"}  # of its loggers.py
TOTALS = {"aurora_rollbacks_total", "aurora_swap_refusals_total"}  # so few that their number is shown, not a rate


def expressions() -> list[str]:
    rules = yaml.safe_load(DASHBOARD.with_name("alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    panels: list[dict[str, Any]] = dashboard()["panels"]
    return [rule["expr"] for rule in rules] + [
        target["expr"] for panel in panels for target in panel.get("targets", ())
    ]


def test_the_dashboard_is_up_to_date() -> None:
    assert json.loads(DASHBOARD.read_text(encoding="utf-8")) == dashboard(), "run python -m tools.dashboard"


def test_metrics_exist_and_counters_are_not_read_as_gauges() -> None:
    for expression in expressions():
        names = re.findall(r"\b(?:aurora_|vllm:)\w+", expression)
        assert names, expression
        for name in names:
            assert name in OURS or name in VLLMS, name
            if OURS.get(name) == "counter" and name not in TOTALS:
                assert re.search(rf"(rate|increase)\({name}\b", expression), expression
        assert "{}" not in expression and expression.count("(") == expression.count(")")


def test_no_two_panels_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
