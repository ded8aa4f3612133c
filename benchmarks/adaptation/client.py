"""vLLM's own ``vllm bench serve``, called as a module.

Its ``benchmark`` is called, not its command line: reading prompts from a file there needs pandas, which vLLM's CPU
wheel does not bring, and a tokenizer for every window. What it measures is the same: streamed chat completions, first
token, every gap between two pieces, and tokens as the server counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

from demo.serving import MODEL_NAME
from demo.workload import Prompt


def load() -> Any:
    """The module ``vllm.benchmarks.serve``. The first call takes seconds of CPU, which belong into nobody's window."""
    with contextlib.redirect_stdout(io.StringIO()):  # vLLM logs while it is imported, and from then on where it did
        from vllm.benchmarks import serve
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of a window that is cut short it reports open sessions
    return serve


def bench(
    url: str, prompts: Sequence[Prompt], concurrency: int, answer_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """Send the prompts, ``concurrency`` at a time, in order; the result of vLLM's ``benchmark``.

    Lists hold a value a request: ``ttfts`` and ``latencies`` in seconds, ``output_lens`` in tokens (0: it failed).
    """
    serve = load()
    requests = [
        serve.SampleRequest(prompt.text, 0, answer_tokens, request_id=str(i)) for i, prompt in enumerate(prompts)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a report of its own
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
