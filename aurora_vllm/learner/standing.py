"""The version that stands: what the learner builds on is what the worker kept, not always what was published last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aurora_vllm.learner.draft import Eagle3Draft, load_draft
from aurora_vllm.session import CHECKPOINT_VERSION
from aurora_vllm.transport.bank import TornPublish, WeightBank
from aurora_vllm.transport.control import WorkerBlock

if TYPE_CHECKING:
    from aurora_vllm.learner.learner import Learner


def standing_version(bank: WeightBank, worker: WorkerBlock) -> int:
    """The newest published version, unless it was rolled back: then the live one. 0 before the first publish."""
    published = bank.published()
    rolled_back = published != 0 and published == worker.rolled_back_version
    return worker.live_version if rolled_back else published


def take_standing(draft: Eagle3Draft, bank: WeightBank, worker: WorkerBlock) -> tuple[int, int]:
    """Put the weights of the version that stands into a draft. Returns which that is, and its lineage: version 1, and
    the draft is as it was, where the bank does not hold it.

    A learner that was killed in a publish may have torn the newest version, which the worker had not taken yet, while
    the live one is held and whole.
    """
    for version in (standing_version(bank, worker), worker.live_version):
        if version <= CHECKPOINT_VERSION:
            break
        try:
            publication = bank.read(version)
            draft.load_state_dict(publication.tensors)
        except TornPublish:
            continue
        return version, publication.lineage
    return CHECKPOINT_VERSION, 0


def follow_rollback(learner: Learner) -> None:
    """Where the incumbent was rolled back, incumbent and candidate become the version that stayed.

    What the candidate learned since it left that version is lost with it: it was built on weights that were found
    worse, and publishing it would repeat them. Replay stays, evidence does not.
    """
    gone = learner.drafts.version
    if gone != learner.control.worker.rolled_back_version:
        return
    draft = load_draft(learner.session.draft)  # version 1, which is not in the bank
    version, lineage = take_standing(draft, learner.bank, learner.control.worker)
    learner.start_over_from(draft, version, lineage, f"version {gone} was rolled back")
    learner.control.learner.message = f"version {gone} was rolled back: learning goes on from version {version}"
