"""The table of all keys of an Aurora YAML, and what becomes of each; docs/aurora_compatibility.md is made from it.

Keys and defaults are those of Aurora's release (aurora/config/{train,inference,mooncake}_config.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SECTIONS = ("model", "dataset", "training", "inference", "decode", "online_serving", "mooncake", "logging", "debug")


@dataclass(frozen=True)
class Key:
    """One key. It has a setting, a flag, or a test for values that describe what is done anyway; else it is not
    honoured."""

    name: str  # dotted; one ending in ".*" stands for everything below it
    default: Any  # Aurora's
    note: str = ""  # how it is honoured, if the setting's name does not tell; or why it is not
    setting: str = ""  # AuroraConfig field
    flag: str = ""  # vLLM option; "MODEL" is its positional argument
    convert: Callable[[Any], Any] = lambda value: value  # Aurora's value -> ours; a ValueError tells what it should be
    holds: Callable[[Any], bool] | None = None
    otherwise: str = ""  # why other values are not honoured, if the note does not tell


def _no(section: str, note: str, **defaults: Any) -> tuple[Key, ...]:
    """Keys that are not honoured, all for the same reason."""
    return tuple(Key(f"{section}.{name}" if section else name, default, note) for name, default in defaults.items())


def _switch(if_true: Any, if_false: Any) -> Callable[[Any], Any]:
    """Aurora's true and false as two values of ours."""

    def convert(value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError("input should be true or false")
        return if_true if value else if_false

    return convert


def _is(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


_NO_RAY = "no Ray: one engine and one learner process, on one machine"
_NO_DATA_SET = "no data set: the learner trains on the served requests, as token ids"
_NO_END = "an online learner has no last step"
_NO_GENERATION = "nothing is generated for training: each request brings its own sampling parameters"
_REPORTING = "nothing is sent anywhere: GET /aurora/status, and aurora_* on vLLM's /metrics"
_NO_DEBUGGING = "no such tool here"

KEYS: tuple[Key, ...] = (
    Key("model.target_model_path", "", "the model to serve, if the command line names none", flag="MODEL"),
    Key("model.draft_pretrained_path", None, setting="draft", convert=str),
    Key("model.trust_remote_code", False, flag="--trust-remote-code"),
    *_no(
        "model",
        "a day-0 draft has the shape of a layer of the target; a given draft brings its own config.json",
        draft_model_config=None,
    ),
    Key(
        "model.embedding_key",
        "model.embed_tokens.weight",
        "the target's embedding is the tensor whose name ends in embed_tokens.weight",
        holds=lambda value: str(value).endswith("embed_tokens.weight"),
    ),
    Key(
        "model.lm_head_key",
        "lm_head.weight",
        "the target's head is the tensor whose name ends in lm_head.weight",
        holds=lambda value: str(value).endswith("lm_head.weight"),
    ),
    *_no("model", "vLLM serves the target", target_model_backend="sglang"),
    *_no(
        "dataset",
        _NO_DATA_SET,
        train_data_path="",
        chat_template="llama3",
        defer_tokenization=False,
        last_turn_loss_only=False,
        prompt_key="conversations",
        num_proc=64,
        pretokenized=False,
    ),
    *_no(
        "dataset",
        "no evaluation set: the drafts are scored on every request before they are trained on it",
        eval_data_path=None,
        eval_interval=50,
        eval_micro_batch_size=None,
        eval_prompt_key=None,
    ),
    Key("training.learning_rate", 1e-4, setting="learning_rate"),
    Key("training.ttt_length", 7, setting="ttt_length"),
    Key("training.max_seq_length", 8192, setting="max_trajectory_tokens"),
    Key("training.num_epochs", 10, "how often each sample is trained on", setting="replay_passes"),
    Key("training.seed", 0, setting="seed"),
    Key("training.train_with_decode", False, "the learner trains on what is decoded for clients", holds=_is(True)),
    Key("training.colocate", False, "the learner shares the machine with serving", holds=_is(True)),
    Key(
        "training.lr_decay_style",
        "cosine",
        f"the learning rate is constant after 3 warm-up steps: {_NO_END}",
        holds=_is("constant"),
    ),
    *_no("training", f"warm-up is 3 steps, not a share: {_NO_END}", warmup_ratio=0.015),
    *_no("training", _NO_END, lr_total_steps=None, num_train_steps=None),
    Key("training.max_grad_norm", 0.5, "gradients are scaled down to norm 1", holds=_is(1)),
    *_no(
        "training",
        "a step takes as many trajectories as make about --aurora-batch-tokens positions",
        micro_batch_size=2,
        draft_accumulation_steps=1,
    ),
    Key(
        "training.gradient_checkpointing",
        False,
        "activations are kept; --aurora-batch-tokens bounds them",
        holds=_is(False),
    ),
    *_no("training", "the learner has its own attention (learner/attention.py)", attention_backend="sdpa"),
    Key("training.training_num_gpus_per_node", 1, "one learner process", holds=_is(1)),
    Key("training.training_num_nodes", 1, "one learner process", holds=_is(1)),
    *_no(
        "training",
        _NO_RAY,
        distributed_backend="nccl",
        distributed_timeout_minutes=10,
        fsdp_strategy="REPLICATE",
        train_backend="fsdp",
        train_env_vars="{}",
        max_concurrent_batches=1,
        prefetch_depth=4,
    ),
    Key("training.load_path", None, "a checkpoint of ours, not of Aurora's trainer", setting="resume"),
    *_no(
        "training",
        "a complete checkpoint is written every checkpoint_interval_s seconds; load_path names the one to resume",
        ckpt_step=None,
        no_save_optim=False,
        save_interval=5000,
        save_per_epoch=False,
    ),
    *_no(
        "inference",
        "the draft's config.json names them (eagle_aux_hidden_state_layer_ids)",
        aux_hidden_states_layers=None,
    ),
    *_no(
        "inference",
        "bounded in bytes: --aurora-ring-mb and --aurora-replay-mb; a full ring drops whole requests",
        max_sample_pool_size=0,
    ),
    *_no("inference", _NO_GENERATION, inference_batch_size=1, inference_buffer_threshold=32, inference_fetch_batch=1),
    *_no("inference", "vLLM serves the target", inference_engine_type="hf"),
    *_no("inference", _NO_RAY, inference_num_gpus=None, inference_num_gpus_per_engine=1, inference_num_gpus_per_node=8),
    *(
        Key(f"inference.sglang.{name}", default, "one engine, one worker", holds=_is(1))
        for name, default in (("tp_size", 8), ("pp_size", 1), ("nnodes", 1))
    ),
    *_no("inference.sglang", "vLLM counts differently: give its own --gpu-memory-utilization", mem_fraction_static=0.8),
    *_no("inference.sglang", _REPORTING, enable_metrics=False),
    *_no("inference.sglang", "use vLLM's --limit-mm-per-prompt", enable_multimodal=False),
    *_no("inference.sglang", _NO_RAY, dist_init_addr=None, dist_timeout=60, init_timeout=300),
    Key("inference.sglang.extra_args.*", {}, "SGLang's own: give vLLM's options instead"),
    Key(
        "decode.speculative_algorithm",
        None,
        "drafts are EAGLE-3",
        holds=lambda value: str(value).upper() == "EAGLE3",
        otherwise="drafts are EAGLE-3; --aurora-speculate never captures and learns without speculation",
    ),
    Key("decode.speculative_draft_model_path", None, setting="draft", convert=str),
    Key("decode.speculative_num_steps", None, setting="num_speculative_tokens"),
    Key("decode.speculative_eagle_topk", None, "drafts are chains, not trees", holds=_is(1)),
    *_no(
        "decode",
        "follows from speculative_num_steps: the drafts and the token before them",
        speculative_num_draft_tokens=None,
    ),
    Key(
        "decode.weight_sync_enabled",
        False,
        "true: a version is published unjudged every weight_sync_interval steps, as in Aurora",
        setting="sync",
        convert=_switch("steps", "evidence"),
    ),
    Key(
        "decode.weight_sync_interval",
        500,
        "optimizer steps, where weight_sync_enabled is true",
        setting="sync_interval",
    ),
    *_no("decode", "weights go through shared memory, not through files", weight_sync_checkpoint_path=None),
    Key("decode.max_running_requests", None, flag="--max-num-seqs"),
    Key("decode.cuda_graph_max_bs", None, flag="--max-cudagraph-capture-size"),
    *_no("decode", _NO_GENERATION, max_new_tokens=512, temperature=1.0, top_k=-1, top_p=1.0),
    Key("online_serving.enabled", False, "the endpoints below", setting="sglang_api"),
    *_no(
        "online_serving",
        "the endpoints are on vLLM's own host and port (--host, --port)",
        host="0.0.0.0",
        port=18080,
    ),
    *_no("online_serving", "server and learner share memory; nothing is posted", sglang_url=None),
    *_no("online_serving", "states are captured in the dtype the target runs in", hidden_states_dtype="bfloat16"),
    Key("mooncake.*", {}, "no Mooncake: hidden states stay on the machine, in shared memory (--aurora-ring-mb)"),
    *_no(
        "logging",
        _REPORTING,
        report_to="none",
        use_tensorboard=False,
        use_wandb=False,
        wandb_dir=None,
        wandb_group=None,
        wandb_host=None,
        wandb_key=None,
        wandb_mode=None,
        wandb_project=None,
        wandb_random_suffix=True,
        wandb_run_id=None,
        wandb_team=None,
    ),
    Key(
        "debug.debug_inference_only", False, "true is --no-aurora-learn", setting="learn", convert=_switch(False, True)
    ),
    *_no(
        "debug",
        _NO_DEBUGGING,
        debug_train_only=False,
        max_dump_steps=5,
        memory_recorder="torch",
        memory_snapshot_dir=".",
        memory_snapshot_num_steps=None,
        memory_snapshot_path="",
        profile_dir_name="/tmp/aurora_profiles",
        profile_step_end=0,
        profile_step_start=0,
        profile_target=["train_overall"],
        record_memory_history=False,
        use_pytorch_profiler=False,
    ),
    *_no("debug", "nothing of the traffic is ever written to disk", save_debug_train_data=None),
    *_no("debug", _REPORTING, enable_perf_metrics=True),
    Key("model_download_dir", None, flag="--download-dir"),
    *_no("", _NO_DATA_SET, cache_dir="./cache", cache_key=None),
    Key("output_dir", "", "checkpoints go there", setting="checkpoint_dir"),
)
