"""The version the learner builds on: the one that the worker kept, which is not always the newest published one."""

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
    """Load the weights of that version into a draft. Returns the version and its lineage. If the bank does not hold it,
    returns version 1 and leaves the draft as it was.

    If a learner was killed during a publish, the newest version may be torn; the live one is held and intact.
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
    """If the incumbent was rolled back, replace incumbent and candidate by the version that stayed.

    What the candidate learned since then is lost, because it is based on weights that were found worse, and publishing
    it would bring them back. The replay is kept, the evidence is not.
    """
    gone = learner.drafts.version
    if gone != learner.control.worker.rolled_back_version:
        return
    draft = load_draft(learner.session.draft)  # version 1, which is not in the bank
    version, lineage = take_standing(draft, learner.bank, learner.control.worker)
    learner.start_over_from(draft, version, lineage, f"version {gone} was rolled back")
    learner.control.learner.message = f"version {gone} was rolled back: learning goes on from version {version}"
