"""The table of SGLang's and Aurora's endpoints that are answered here: paths, bodies, answers. The routes
(sglang_api.py) and docs/aurora_compatibility.md are made from it.

SGLang's are those of v0.5 (srt/entrypoints/http_server.py) with Aurora's patch for updating the draft; Aurora's are
those of its callback server (controller/training_external_server.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field


class UpdateWeights(BaseModel):
    """Body of ``POST /update_weights_from_disk``."""

    model_path: str = Field(
        description="directory of an EAGLE-3 checkpoint: config.json, and *.safetensors or pytorch_model.bin"
    )
    update_draft_model: bool = Field(False, description="must be true: the target's weights are never changed")
    weight_version: str | None = Field(None, description="ignored: versions are numbered here")
    load_format: str | None = Field(None, description="ignored: the format is recognised by the file name")
    flush_cache: bool = Field(True, description="ignored: prompts cached with the old draft are forgotten anyway")
    abort_all_requests: bool = Field(False, description="ignored: the swap is between two steps, requests go on")
    keep_pause: bool = Field(False, description="ignored: nothing is paused")
    is_async: bool = Field(False, description="ignored: the answer is sent once the next step will run the new weights")
    recapture_cuda_graph: bool = Field(False, description="ignored: addresses do not change, so graphs stay valid")
    torch_empty_cache: bool = Field(False, description="ignored: a swap frees no memory")
    token_step: int = Field(0, description="ignored: versions are numbered here")
    manifest: dict[str, Any] | None = Field(None, description="ignored: shapes and dtypes are read from the files")


class PushSample(BaseModel):
    """Body of ``POST /push_sample``."""

    data_id: str = Field(description="checked, not kept")
    mooncake_key: str = Field(description="checked, not kept")
    tensor_shapes: dict[str, list[int]] = Field(description="checked, not kept")
    prompt_tokens: int = Field(description="checked, not kept")
    completion_tokens: int = Field(0, description="checked, not kept")


@dataclass(frozen=True)
class Endpoint:
    """One endpoint."""

    method: str
    path: str
    origin: str  # whose it is
    handler: str  # method of SglangApi
    answer: str
    here: str  # what it does, and where it differs
    body: type[BaseModel] | None = None


ENDPOINTS = (
    Endpoint(
        "POST",
        "/update_weights_from_disk",
        "SGLang, patched",
        "update_weights_from_disk",
        '200 or 400, `{"success", "message", "num_paused_requests"}`',
        "The checkpoint is compared with the running draft: config, names, shapes, dtypes, finite values, vocabulary "
        "map, embedding. If it fits, it goes through the weight bank and is swapped in between two steps. No request "
        "is paused; prompts cached with the old draft are forgotten. The learner publishes it and goes on learning "
        "from the new weights; with `--no-aurora-learn` the server publishes it. Success is reported once the worker "
        "has the weights ready: no later step starts without them.",
        UpdateWeights,
    ),
    Endpoint(
        "POST",
        "/push_sample",
        "Aurora's learner",
        "push_sample",
        '501, `{"status": "refused", "pool_size", "message"}`; 422 if the body is not a sample',
        "Refused, not dropped silently: samples are captured in the server itself, and there is no Mooncake store to "
        "fetch a pushed one from.",
        PushSample,
    ),
    Endpoint(
        "GET",
        "/health",
        "Aurora's learner; SGLang; vLLM",
        "health",
        '`{"status", "pool_size"}`, status code of the engine',
        "All three have this endpoint, and here they share a port. The status code is vLLM's own (an engine that "
        'serves without a learner is healthy); the body is the learner\'s. `status` is "ok", or the state of a '
        'learner that is not alive: "off", "waiting", "starting", "down".',
    ),
    Endpoint(
        "GET",
        "/aurora/health",
        "ours",
        "learner_health",
        '200 or 503, `{"status", "pool_size"}`',
        "The same with the learner's health in the status code, for a probe of the learner alone. `pool_size` counts "
        "the trajectories in the replay buffer.",
    ),
    Endpoint(
        "GET",
        "/get_server_info",
        "SGLang",
        "get_server_info",
        '`{"model_path", "speculative_*", "internal_states": [{"avg_spec_accept_length", ...}], "version", ...}`',
        "`avg_spec_accept_length` is the mean since the start, copies included. It counts the bonus token, as in "
        "SGLang, and is null before the first verification. It is in `internal_states[0]` and, as in older SGLang, at "
        "the top level. `last_gen_throughput` is tokens/s since the previous request to this endpoint. "
        "`weight_version` is the live draft's.",
    ),
)
