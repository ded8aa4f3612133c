"""Plain vLLM in a process of its own, nothing of aurora in it: ``python plain.py`` with a JSON request on stdin."""

from __future__ import annotations

import json
import sys


def main() -> None:
    request = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    llm = LLM(disable_log_stats=False, **request["arguments"])
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True)
    outputs = llm.generate(request["prompts"], sampling, use_tqdm=False)
    found = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "drafts": found["vllm:spec_decode_num_drafts"],
        "accepted": found["vllm:spec_decode_num_accepted_tokens"],
        "aurora": sorted(name for name in sys.modules if name.startswith("aurora_vllm")),
    }
    print("\n" + json.dumps(answer))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
