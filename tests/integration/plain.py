"""Plain vLLM in a process of its own, nothing of aurora in it: ``python plain.py`` with a JSON request on stdin.

One process for all engines that a file asks for, one after the other: importing vLLM takes longer than serving.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def serve(
    engines: Sequence[dict[str, Any]], prompts: Sequence[str | list[int]], max_tokens: int
) -> list[dict[str, Any]]:
    """Run it: each engine's greedy answers of ``max_tokens`` tokens, and vLLM's own count of verifications and accepted
    drafts.

    Args:
        engines: arguments of vllm.LLM for each.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AURORA_")}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({"engines": list(engines), "prompts": prompts, "max_tokens": max_tokens}),
        env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    request = json.load(sys.stdin)
    gc.set_threshold(50_000, 20, 100)  # as to why, see tests/conftest.py
    print("\n" + json.dumps([_serve(arguments, request) for arguments in request["engines"]]))


def _serve(arguments: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(disable_log_stats=False, **arguments)
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True)
    prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in request["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    found = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "drafts": found["vllm:spec_decode_num_drafts"],
        "accepted": found["vllm:spec_decode_num_accepted_tokens"],
        "aurora": sorted(name for name in sys.modules if name.startswith("aurora_vllm")),
    }
    llm.llm_engine.engine_core.shutdown()
    return answer


if __name__ == "__main__":
    main()
