"""Reads flags, environment and YAML files into one AuroraConfig, before anything heavy is imported.

Precedence: ``--aurora-*`` flags, then ``AURORA_*`` environment, then the YAML file of ``--aurora-config``, then keys
``aurora-*`` in the file of vLLM's ``--config``, then the defaults. The keys are AuroraConfig's field names everywhere.
All other arguments are left to vLLM, in their order.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from aurora_vllm import settings_file
from aurora_vllm.config import FLAG_PREFIX, AuroraConfig, flag_of
from aurora_vllm.errors import SettingsError, notice, unknown
from aurora_vllm.interop.aurora_yaml import AuroraFile
from aurora_vllm.settings_file import Settings

ENVIRONMENT_PREFIX = "AURORA_"
# Ours, but not settings: the session or why there is none (aurora_vllm.session), the YAML file, and the off switch.
RESERVED_ENVIRONMENT = frozenset({"AURORA_SESSION", "AURORA_SERVED_PLAIN", "AURORA_CONFIG", "AURORA_OFF"})
LIKE_A_SETTING = 0.7  # difflib's ratio from which on a variable is taken for a misspelt setting
# Variables that Kubernetes sets for a service: AURORA_LEARNER_PORT_80_TCP for one called aurora-learner.
OF_A_SERVICE = re.compile(r".+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
SWITCHES = {
    "off": "plain vLLM: same arguments, nothing of aurora_vllm (AURORA_OFF=1 does the same)",
    "plan": "print what would run, and exit; --aurora-plan=json prints JSON",
    "config": "YAML file of settings, keys as below without --aurora-, or a file of Aurora's own (or AURORA_CONFIG)",
    "help": "show these options, and exit",
}


@dataclass(frozen=True)
class Invocation:
    """A command line, parsed as far as it concerns aurora_vllm."""

    config: AuroraConfig
    off: bool
    plan: Literal["", "text", "json"]
    help: bool
    vllm_argv: list[str]  # what is left for vLLM; without a leading "serve"
    explicit: frozenset[str]  # fields that were set, as opposed to defaults
    aurora_file: AuroraFile | None = None  # the YAML file, where it is one of Aurora's own


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Invocation:
    """Read the settings.

    Raises:
        SettingsError: unknown keys or wrong values, one line for each.
        AuroraError: the YAML file cannot be read.
    """
    flags, vllm_argv = _split(argv)
    switches = {name: flags.pop(name) for name in SWITCHES if name in flags}
    off = bool(switches.get("off")) or _is_true("AURORA_OFF", environment.get("AURORA_OFF", ""))
    aurora_file = None
    layers = [{key: (flag_of(key), value) for key, value in flags.items()}]
    if not off:  # with --aurora-off settings do not matter: a stray variable must not stop plain vLLM
        file = switches.get("config") or environment.get("AURORA_CONFIG")
        from_file, aurora_file = settings_file.read(Path(file).expanduser()) if file else ({}, None)
        layers += [_from_environment(environment), from_file, settings_file.in_vllms(vllm_argv)]

    settings: Settings = {}
    for layer in reversed(layers):
        settings |= layer
    vllm_argv = vllm_argv[1:] if vllm_argv[:1] == ["serve"] else vllm_argv
    if aurora_file is not None:
        aurora_file = aurora_file.overridden(settings)
        # Before the user's options, because the last of two equal ones wins; after the model, which vLLM wants first.
        model = [word for word in vllm_argv[:1] if not word.startswith("-")]
        vllm_argv = [*model, *aurora_file.flags, *vllm_argv[len(model) :]]
    return Invocation(
        config=_validate(settings),
        off=off,
        plan=switches.get("plan", ""),
        help=bool(switches.get("help")),
        vllm_argv=vllm_argv,
        explicit=frozenset(settings),
        aurora_file=aurora_file,
    )


def parser() -> argparse.ArgumentParser:
    """The ``--aurora-*`` flags, generated from AuroraConfig's fields. Values stay text: pydantic validates them."""
    parser = _Parser(prog="aurora_vllm", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group(
        "Aurora",
        "Each option is also an environment variable (--aurora-ring-mb: AURORA_RING_MB) and a key of a YAML file "
        "(ring_mb). Options override the environment, the environment overrides the file.",
    )
    for name in ("off", "help"):
        group.add_argument(f"{FLAG_PREFIX}{name}", action="store_true", help=SWITCHES[name])
    # Not argparse's nargs="?": that would swallow the model in "--aurora-plan MODEL".
    group.add_argument(f"{FLAG_PREFIX}plan", action="store_const", const="text", help=SWITCHES["plan"])
    group.add_argument(
        f"{FLAG_PREFIX}plan=json", dest="aurora_plan", action="store_const", const="json", help=argparse.SUPPRESS
    )
    group.add_argument(f"{FLAG_PREFIX}config", metavar="FILE.yaml", help=SWITCHES["config"])
    for name, field in AuroraConfig.model_fields.items():
        flag = flag_of(name)
        default = "" if field.default is None else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, metavar=_metavar(field), help=text)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage
        raise SettingsError(
            [message.removeprefix("argument ").replace("ignored explicit argument", "takes no value, not")]
        )


def _split(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """``--aurora-*`` flags by field name, and everything else in order."""
    # As in vLLM's FlexibleArgumentParser, --aurora_ring_mb means --aurora-ring-mb.
    words = [_normalise(word) if _is_ours(word) else word for word in argv]
    own = parser()
    taken, rest = own.parse_known_args(words)
    strange = [word.split("=")[0] for word in rest if _is_ours(word)]
    if strange:
        known = [option for action in own._actions for option in action.option_strings]
        raise SettingsError([unknown(f"unknown option {word}", word, known) for word in strange])
    return {name.removeprefix("aurora_"): value for name, value in vars(taken).items()}, rest


def _is_ours(word: str) -> bool:
    return _normalise(word).startswith((FLAG_PREFIX, "--no-aurora-")) or word == "--aurora"


def _normalise(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _from_environment(environment: Mapping[str, str]) -> Settings:
    """Settings in ``AURORA_*`` variables. Empty ones count as not set. Those unlike any setting are ignored: they may
    be another program's (AWS has an Aurora, too)."""
    found: Settings = {}
    wrong = []
    for variable in sorted(set(environment) - RESERVED_ENVIRONMENT):
        if not variable.startswith(ENVIRONMENT_PREFIX) or not environment[variable]:
            continue
        field = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if field in AuroraConfig.model_fields:
            found[field] = (variable, environment[variable])
        elif OF_A_SERVICE.fullmatch(variable):
            continue
        elif difflib.get_close_matches(field, AuroraConfig.model_fields, n=1, cutoff=LIKE_A_SETTING):
            known = [ENVIRONMENT_PREFIX + name.upper() for name in AuroraConfig.model_fields]
            wrong.append(unknown(f"unknown environment variable {variable}", variable, known))
        else:
            notice(f"environment variable {variable} is like no setting of Aurora's and ignored")
    if wrong:
        raise SettingsError(wrong)
    return found


def _validate(settings: Settings) -> AuroraConfig:
    try:
        config = AuroraConfig(**{field: value for field, (_, value) in settings.items()})
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            field = str(fault["loc"][0])
            where, value = settings.get(field, (f"{flag_of(field)}, not given", fault["input"]))
            reason = fault["msg"][:1].lower() + fault["msg"][1:]
            lines.append(f"{where}: {reason}, not {value!r}")
        raise SettingsError(lines) from None
    if config.semantics == "aurora-release" and "prompt_weight" in settings and config.prompt_weight > 0:
        where, value = settings["prompt_weight"]
        raise SettingsError([f"{where}: Aurora's release trains on no prompts, it should be 0, not {value!r}"])
    return config


def _is_true(variable: str, text: str) -> bool:
    try:
        return TypeAdapter(bool).validate_python(text or "0")
    except ValidationError:
        raise SettingsError([f"{variable}: input should be a valid boolean, not {text!r}"]) from None


def _metavar(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "{" + ",".join(get_args(field.annotation)) + "}"
    kinds = {*get_args(field.annotation), field.annotation}  # of a union, its members
    return "N" if int in kinds else "X" if float in kinds else "PATH"
