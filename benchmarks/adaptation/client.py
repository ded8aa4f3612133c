"""vLLM's own ``vllm bench serve``, called as a module.

The function ``benchmark`` is called, not the command line: to read prompts from a file, the latter needs pandas, which
vLLM's CPU wheel does not install, and a tokenizer for every window. The measurements are the same: streamed chat
completions, time to the first token, every gap between two chunks, and tokens as counted by the server.
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
    """The module ``vllm.benchmarks.serve``. The first call takes seconds of CPU, so it is made before any window."""
    with contextlib.redirect_stdout(io.StringIO()):  # vLLM's logger keeps the stdout that it found at import
        from vllm.benchmarks import serve
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # would report open sessions of an interrupted window
    return serve


def bench(
    url: str, prompts: Sequence[Prompt], concurrency: int, answer_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """Send the prompts in order, ``concurrency`` at a time. Returns the result of vLLM's ``benchmark``.

    Its lists hold one value per request: ``ttfts`` and ``latencies`` in seconds, ``output_lens`` in tokens (0: failed).
    """
    serve = load()
    requests = [
        serve.SampleRequest(prompt.text, 0, answer_tokens, request_id=str(i)) for i, prompt in enumerate(prompts)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # ``benchmark`` prints a report
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
                ready_check_timeout_sec=0,  # no check: it would send the first prompt twice
            )
        )
    return result
