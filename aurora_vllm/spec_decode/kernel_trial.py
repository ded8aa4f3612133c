"""The worker's own kernels, tried by a process that does nothing else.

A kernel that reads a wrong address takes the process that launched it along, which in a server is the engine. So before
the worker loads them another process does::

    python -m aurora_vllm.spec_decode.kernel_trial DEVICE HIDDEN_SIZE NUM_AUX DTYPE POSITIONS
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch

from aurora_vllm.transport.probe import TIMEOUT_S, exception_line
from aurora_vllm.transport.rows import RowLayout

BEGUN = "begun"


def try_kernels(layout: RowLayout, device: torch.device, positions: int, timeout_s: float = TIMEOUT_S) -> str:
    """What speaks against loading the kernels in this process, "" where nothing does.

    That another process cannot have the device at all (a GPU in exclusive mode, no room) says nothing of them.

    Args:
        layout: of the ring's rows.
        device: the target's; on a CPU there are no such kernels.
        positions: tokens of a proposal that may be copied; 0 for none.
    """
    if device.type != "cuda":
        return ""
    dtype = str(layout.dtype).removeprefix("torch.")
    arguments = map(str, (device, layout.hidden_size, layout.num_aux, dtype, positions))
    command = [sys.executable, "-m", __name__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        return f"they did not end within {timeout_s:g} s" if BEGUN.encode() in (error.stdout or b"") else ""
    if not done.returncode or BEGUN.encode() not in done.stdout:
        return ""
    return exception_line(done.stderr.decode(errors="replace")) or f"exit code {done.returncode}"


def main(device_name: str, hidden_size: int, num_aux: int, dtype: str, positions: int) -> int:
    """Launch every kernel, and wait for it."""
    device = torch.device(device_name)
    torch.zeros(1, device=device)  # the context
    print(BEGUN, flush=True)
    from aurora_vllm.spec_decode.capture_kernel import KernelFill
    from aurora_vllm.spec_decode.rehearsal import rehearse

    layout = RowLayout(hidden_size, num_aux, getattr(torch, dtype))
    rehearse(KernelFill(layout), layout, device, device)  # ends with a copy to the host, which waits
    if positions:
        _copy(positions, device)
    return 0


def _copy(positions: int, device: torch.device) -> None:
    """A request that says one thing over and over has it proposed, and judged. Raises RuntimeError where it has not.

    The rehearsal alone would read none of the tables: there nobody has sampled anything.
    """
    from aurora_vllm.control.copy_counts import NUM_KINDS
    from aurora_vllm.spec_decode.device_copies import DeviceCopies
    from aurora_vllm.spec_decode.request_states import request_states

    one = torch.ones(1, dtype=torch.int32, device=device)
    states = request_states(one.repeat(1, 64), 32 * one, np.full(1, 8, dtype=np.int32), vocabulary=64)
    copies = DeviceCopies(states, positions, 1024, device)
    copies.rehearse()
    copies.begin("0", SimpleNamespace(extra_args=None, temperature=0.0))
    batch = SimpleNamespace(
        num_reqs=1, req_ids=["0"], idx_mapping=torch.zeros(1, dtype=torch.int64, device=device),
        idx_mapping_np=np.zeros(1, np.int64), num_computed_tokens_np=np.full(1, 31),
        num_scheduled_tokens=np.ones(1, np.int64), prefill_len_np=np.full(1, 32),
    )  # fmt: skip
    drafts = torch.zeros(1, positions, dtype=torch.int64, device=device)
    for _ in range(2):  # the second judges what the first proposed
        copies.replace(batch, one, positions * one, drafts, positions, 1, (1 << NUM_KINDS) - 1)
    if drafts.tolist() != [[1] * positions]:  # waits, too
        raise RuntimeError(f"a copy of ones is {drafts.tolist()}")


if __name__ == "__main__":
    device, hidden_size, num_aux, dtype, positions = sys.argv[1:]
    sys.exit(main(device, int(hidden_size), int(num_aux), dtype, int(positions)))
