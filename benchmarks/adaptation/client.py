"""vLLM's own ``vllm bench serve``, called as a module.

Its ``benchmark`` is called, not its command line: reading prompts from a file there needs pandas, which vLLM's CPU
wheel does not bring, and a tokenizer for every window. What it measures is the same: streamed chat completions, first
token, every gap between two pieces, and tokens as the server counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Sequence
from typing import Any

from demo.serving import MODEL_NAME
from demo.workload import Prompt


def bench(
    url: str, prompts: Sequence[Prompt], concurrency: int, answer_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """Send the prompts, ``concurrency`` at a time, in order; the result of vLLM's ``benchmark``.

    Lists hold a value a request: ``ttfts`` and ``latencies`` in seconds, ``output_lens`` in tokens (0: it failed).
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a report of its own, and vLLM logs while importing
        from vllm.benchmarks import serve
        from vllm.benchmarks.datasets import SampleRequest

        requests = [SampleRequest(prompt.text, 0, answer_tokens, request_id=str(i)) for i, prompt in enumerate(prompts)]
        result: dict[str, Any] = asyncio.run(
            serve.benchmark(
                task_type=serve.TaskType.GENERATION,
                endpoint_type="openai-chat",
                api_url=f"{url}/v1/chat/completions",
                base_url=url,
                model_id=MODEL_NAME,
                model_name=MODEL_NAME,
                tokenizer=None,  # the server counts tokens
                input_requests=requests,
                logprobs=None,
                request_rate=float("inf"),
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=[],
                selected_percentiles=[],
                ignore_eos=False,
                goodput_config_dict={},
                max_concurrency=concurrency,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": temperature, "seed": seed},
                ready_check_timeout_sec=0,  # the first prompt would be sent twice
            )
        )
    return result
