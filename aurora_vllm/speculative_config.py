"""vLLM's own ``--speculative-config`` and its short flags, as the user gave them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pydantic import ValidationError

from aurora_vllm.config import AuroraConfig, flag_of
from aurora_vllm.errors import PLAIN, AuroraError

FLAG = "--speculative-config"
SHORT_FLAGS = {"--spec-method": "method", "--spec-model": "model", "--spec-tokens": "num_speculative_tokens"}
QUANTISED, UNCAPTURED = "Aurora cannot update a quantised draft", "Aurora cannot read the verdicts then"
UNSUPPORTED = {  # key -> why not
    "quantization": QUANTISED,
    "draft_lm_head_quantization": QUANTISED,  # from vLLM 0.33 on
    "parallel_drafting": "Aurora trains drafts that propose one token after another",
    "enable_adaptive_verification": UNCAPTURED,  # the GPU decides how much is verified, after the scheduler
    "use_heterogeneous_vocab": "Aurora trains drafts with the target's tokens",
}


def take_speculative_config(args: Namespace, config: AuroraConfig, explicit: frozenset[str]) -> AuroraConfig:
    """Take the draft, and K, from vLLM's --speculative-config and its short flags.

    Args:
        args: vLLM's parsed arguments; its short flags are moved into ``speculative_config``.
        explicit: the settings that were given; one that differs from what is said here is a contradiction.

    Raises:
        AuroraError: another method, no model, or a contradiction.
    """
    by = _fold_short_flags(args)
    if args.speculative_config is None:
        return config
    given = given_fields(args)
    method, model = given.get("method", "eagle3"), given.get("model")
    if method != "eagle3" or not model:
        what = f"method {method!r}" if method != "eagle3" else "no model"
        raise AuroraError(f"Aurora trains EAGLE-3 drafts, and {by} says {what}", f"leave it out, or {PLAIN}")
    for key, why in UNSUPPORTED.items():
        if given.get(key):
            raise AuroraError(f"{why}, and {by} says {key} {given[key]}", f"leave that out, or {PLAIN}")
    said = {"draft": str(model)}
    if "num_speculative_tokens" in given:
        said["num_speculative_tokens"] = given["num_speculative_tokens"]
    for key, value in said.items():
        if key in explicit and str(getattr(config, key)) != str(value):
            raise AuroraError(
                f"{by} and {flag_of(key)} disagree ({value} and {getattr(config, key)})", "give one of them"
            )
    try:
        return AuroraConfig(**(config.model_dump() | said))
    except ValidationError as error:
        fault = error.errors()[0]
        raise AuroraError(f"{by}: {fault['loc'][0]}: {fault['msg']}, not {fault['input']!r}") from None


def given_fields(args: Namespace) -> dict[str, Any]:
    """The content of ``--speculative-config``, by the names of vLLM's fields."""
    return {key.replace("-", "_"): value for key, value in (getattr(args, "speculative_config", None) or {}).items()}


def _fold_short_flags(args: Namespace) -> str:
    """Move the short flags' values into the long one's, as vLLM would do later. Returns the flags used, in words."""
    flags = [FLAG] if args.speculative_config is not None else []
    for flag, key in SHORT_FLAGS.items():
        name = flag.removeprefix("--").replace("-", "_")
        value = getattr(args, name, None)  # an older vLLM has none
        if value is None:
            continue
        given = args.speculative_config or {}
        if key in given or key.replace("_", "-") in given:
            raise AuroraError(f"{flag} and {FLAG} both say {key}", "give one of them")
        args.speculative_config = given | {key: value}
        setattr(args, name, None)
        flags.append(flag)
    return " with ".join(flags)
