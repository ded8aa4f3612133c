"""``aurora_*`` on vLLM's own ``/metrics``, read from the control block whenever Prometheus asks.

:data:`METRICS` is the one list of them; docs/metrics.md is printed from it (``python -m aurora_vllm.server.metrics``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

logger = logging.getLogger("vllm.aurora")

Status = Mapping[str, Any]  # aurora_vllm.server.status.status()
Family = CounterMetricFamily | GaugeMetricFamily


@dataclass(frozen=True)
class Metric:
    """One metric, and where in a status its value lies."""

    name: str  # as Prometheus shows it; counters end in _total
    source: str  # keys joined by dots; by version, a field of the rows in versions.acceptance; of BUILD, one per label
    help: str
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"

    def samples(self, status: Status) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Label values and value; a value of None has nothing to say.

        By version there are two series, "live" and "previous": a server's life has thousands of versions.
        """
        if self.labels == BUILD:
            yield tuple(str(_at(status, source)) for source in self.source.split()), 1
            return
        if self.labels == VERSION:
            versions = status["versions"]
            rows = {row["version"]: row for row in versions["acceptance"]}
            for which in ("live", "previous"):
                if (row := rows.get(versions[which])) is not None:
                    yield (which,), row[self.source]
            return
        value = _at(status, self.source)
        if not self.labels:
            yield (), value == "on" if isinstance(value, str) else value
            return
        for position in range(int(status["config"]["num_speculative_tokens"])):
            yield (str(position),), value[position]


VERSION, POSITION, BUILD = ("version",), ("position",), ("version", "vllm_version", "model_runner")

UP = Metric(
    "aurora_up", "aurora", "1 where Aurora serves; 0 where vLLM is served plain because this version of it does not fit"
)
METRICS: tuple[Metric, ...] = (
    UP,
    Metric(
        "aurora_build_info",
        "aurora_version vllm_version worker.model_runner",
        "1; the labels are the versions of aurora_vllm and vLLM, and vLLM's model runner",
        BUILD,
    ),
    Metric(
        "aurora_worker_attached",
        "worker.attached",
        "1 while the worker swaps and, with a learner, captures; 0 while it starts, and where it could not attach",
    ),
    Metric("aurora_draft_version_live", "versions.live", "Version of the draft weights that run"),
    Metric("aurora_draft_version_published", "versions.published", "Newest version the learner published"),
    Metric(
        "aurora_acceptance_length",
        "mean_acceptance_length",
        'Mean, bonus token included, of the draft version that is "live" and the "previous" one',
        VERSION,
    ),
    Metric("aurora_drafts_total", "versions.total.num_drafts", "Verifications of the draft's own proposals"),
    Metric("aurora_draft_tokens_total", "versions.total.num_draft_tokens", "Draft tokens verified"),
    Metric("aurora_accepted_tokens_total", "versions.total.num_accepted", "Draft tokens accepted"),
    Metric(
        "aurora_accepted_tokens_per_position_total",
        "versions.total.accepted_per_position",
        "The same, by draft position",
        POSITION,
    ),
    Metric("aurora_draft_length", "speculation.draft_length", "Draft length K in use; 0 is no speculation"),
    Metric("aurora_steps_total", "speculation.steps", "Engine steps"),
    Metric(
        "aurora_speculative_steps_total",
        "speculation.spec_steps",
        "Engine steps that verified proposals, drafted or copied",
    ),
    Metric("aurora_copied_drafts_total", "speculation.copied_drafts", "Verifications of copied drafts"),
    Metric("aurora_copied_tokens_total", "speculation.copied_tokens", "Copied tokens verified"),
    Metric("aurora_copied_accepted_tokens_total", "speculation.copied_accepted", "Copied tokens accepted"),
    Metric("aurora_swaps_total", "swaps.swaps", "Exchanges of the draft's weights, rollbacks included"),
    Metric("aurora_swap_refusals_total", "swaps.refusals", "Published weights the worker refused"),
    Metric("aurora_swap_stall_seconds", "swaps.last_swap_stall_s", "How long the last swap held up a step"),
    Metric("aurora_rollbacks_total", "rollout.rollbacks", "Versions rolled back because they accepted less"),
    Metric("aurora_probation_drafts", "rollout.probation_drafts", "Verifications that judge the newest version"),
    Metric(
        "aurora_probation_evidence",
        "rollout.probation_evidence",
        "Evidence that the newest version accepts over 15 % fewer draft tokens than the one before it (a test "
        "martingale); it is rolled back at 2 / (1 - rollback_confidence)",
    ),
    Metric(
        "aurora_capture_on",
        "capture.on",
        "1 while steps are captured; 0 without a learner, before the worker is up, or after three faults in a row",
    ),
    Metric("aurora_capture_errors_total", "capture.errors", "Faults in the capture hook"),
    Metric("aurora_requests_seen_total", "capture.requests_seen", "Requests the hook saw"),
    Metric(
        "aurora_requests_captured_total",
        "capture.requests_captured",
        "Requests chosen for capture, those dropped later included",
    ),
    Metric("aurora_requests_dropped_total", "capture.requests_dropped", "Requests dropped because the ring was full"),
    Metric("aurora_requests_opted_out_total", "capture.requests_opted_out", "Requests kept out, or of one token"),
    Metric("aurora_rows_written_total", "capture.rows_written", "Rows written to the trace ring"),
    Metric("aurora_ring_used_rows", "ring.used", "Rows in the trace ring that the learner has not read"),
    Metric("aurora_ring_capacity_rows", "ring.capacity", "Rows the trace ring holds"),
    Metric("aurora_learner_alive", "learner.alive", "1 while the learner's heartbeat is fresh; none without a learner"),
    Metric("aurora_learner_heartbeat_age_seconds", "learner.heartbeat_age_s", "Age of the learner's heartbeat"),
    Metric("aurora_learner_restarts_total", "learner.restarts", "Times the learner was started again"),
    Metric("aurora_learner_steps_total", "learner.steps_taken", "Optimizer steps"),
    Metric("aurora_learner_trajectories_total", "learner.trajectories", "Trajectories assembled"),
    Metric("aurora_learner_trajectories_discarded_total", "learner.trajectories_discarded", "Trajectories given up"),
    Metric("aurora_learner_tokens_seen_total", "learner.tokens_seen", "Tokens in assembled trajectories"),
    Metric("aurora_learner_tokens_trained_total", "learner.tokens_trained", "Tokens trained on"),
    Metric("aurora_learner_cpu_seconds_total", "learner.cpu_seconds", "CPU time of the learner"),
    Metric("aurora_learner_checkpoints_total", "learner.checkpoints", "Checkpoints written"),
    Metric(
        "aurora_learner_checkpoint_failures_total",
        "learner.checkpoint_failures",
        "Checkpoints that could not be written",
    ),
    Metric("aurora_learner_publishes_total", "learner.publishes", "Versions published"),
    Metric(
        "aurora_learner_share",
        "guard.learner_share",
        "Factor on learner_cpu_share: what its draft (at first: speculation) earns, times the slowdown guard",
    ),
    Metric(
        "aurora_learner_slowdown",
        "guard.learner_slowdown",
        "What learning adds to the time per output token, as a share of it",
    ),
    Metric("aurora_learner_asleep", "learner.asleep", "1 while the learner sleeps because training no longer helps"),
    Metric("aurora_learner_sleeps_total", "learner.sleeps", "Times the learner fell asleep"),
    Metric(
        "aurora_learner_trial_gain",
        "learner.trial_gain",
        "Acceptance length won by training, over its newest trial; below 0.03 it sleeps",
    ),
    Metric("aurora_learner_loss", "learner.loss", "Loss of the last optimizer step"),
    Metric("aurora_replay_bytes", "learner.replay_bytes", "Bytes in the replay buffer"),
    Metric("aurora_replay_tokens", "learner.replay_tokens", "Tokens in the replay buffer"),
    Metric(
        "aurora_candidate_acceptance_length",
        "learner.candidate_acceptance_length",
        "Simulated acceptance length of the weights in training",
    ),
    Metric(
        "aurora_incumbent_acceptance_length",
        "learner.incumbent_acceptance_length",
        "Simulated acceptance length of the live weights on the same trajectories",
    ),
    Metric(
        "aurora_vocabulary_coverage",
        "learner.vocabulary_coverage",
        "Share of the target's recent tokens that are in the live draft's vocabulary",
    ),
    Metric("aurora_vocabulary_changes_total", "learner.vocabulary_changes", "Times a draft vocabulary was chosen anew"),
)


class AuroraCollector(Collector):
    """All of :data:`METRICS`, or some, from one status per scrape."""

    def __init__(self, read: Callable[[], Status], metrics: Sequence[Metric] = METRICS) -> None:
        self._read, self._metrics, self._told = read, metrics, False

    def describe(self) -> list[Family]:
        """Names without values, so that registering reads nothing."""
        return [_family(metric) for metric in self._metrics]

    def collect(self) -> Iterator[Family]:
        try:
            status = self._read()
        except Exception:  # vLLM's own metrics share the page: better without ours than none
            if not self._told:
                self._told = True
                logger.exception("aurora: the status cannot be read, so its metrics are missing")
            return
        for metric in self._metrics:
            family = _family(metric)
            for labels, value in metric.samples(status):
                if value is not None:
                    family.add_metric(labels, float(value))
            yield family


def register(
    read: Callable[[], Status], registry: CollectorRegistry = REGISTRY, metrics: Sequence[Metric] = METRICS
) -> AuroraCollector:
    """Add the collector to a registry, in place of an older one.

    Args:
        read: gives the status of now.
        metrics: those that this status has.
    """
    for old in [known for known in registry._collector_to_names if isinstance(known, AuroraCollector)]:
        registry.unregister(old)
    collector = AuroraCollector(read, metrics)
    registry.register(collector)
    return collector


def table() -> str:
    """docs/metrics.md."""
    head = "# Metrics\n\nOn vLLM's `/metrics`; written by `python -m aurora_vllm.server.metrics > docs/metrics.md`.\n"
    rows = [f"| `{m.name}` | {m.kind} | {', '.join(m.labels) or '–'} | {m.help} |" for m in METRICS]
    return "\n".join([head, "| name | kind | labels | what |", "|---|---|---|---|", *rows]) + "\n"


def _at(status: Status, source: str) -> Any:
    value: Any = status
    for key in source.split("."):
        value = value[key]
    return value


def _family(metric: Metric) -> Family:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)


if __name__ == "__main__":
    print(table(), end="")
