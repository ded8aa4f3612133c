"""AuroraWorker: vLLM's worker, with capture and weight swaps attached after the model is loaded.

Chosen by ``--worker-cls``. It is a subclass of the platform's own worker; five methods are extended, and each calls the
original. If anything fails here, plain serving goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

from aurora_vllm.spec_decode.attachment import Attachment
from aurora_vllm.spec_decode.frame_stack import with_roomy_steps
from aurora_vllm.spec_decode.mends import mend
from aurora_vllm.spec_decode.sampling_fix import sample_plainly_without_drafts

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


@with_roomy_steps
class AuroraWorker(PlatformWorker):
    """vLLM's worker with capture and weight swaps."""

    _aurora: Attachment | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        mend(self)
        if hasattr(self.model_runner, "drafter"):  # V1; in a fork the patch does this
            sample_plainly_without_drafts(self.model_runner)
        self._aurora = Attachment.to_worker(self)

    def compile_or_warm_up_model(self) -> Any:
        done = super().compile_or_warm_up_model()
        self._start_serving()
        return done

    def _maybe_activate_jit_monitor(self) -> None:
        """On a GPU this is the end of the warm-up: vLLM warns of kernels that are compiled later, or raises."""
        self._start_serving()
        super()._maybe_activate_jit_monitor()

    def _start_serving(self) -> None:
        if self._aurora is not None:
            self._aurora.start_serving()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if self._aurora is not None:
            self._aurora.step_starts(scheduler_output)
        return super().execute_model(scheduler_output)

    def shutdown(self) -> None:
        if self._aurora is not None:
            self._aurora.close()
        super().shutdown()
