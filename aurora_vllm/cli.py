"""The ``aurora-vllm`` command: ``serve`` is ``python -m aurora_vllm.entrypoint``, ``export`` takes a draft out.

Kept light at import, as the entrypoint is: processes that vLLM spawns import it again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aurora_vllm import entrypoint
from aurora_vllm.errors import AuroraError, report

app = typer.Typer(add_completion=False, help="vLLM's server with a speculator that learns.")


class ExportFormat(StrEnum):
    eagle3 = "eagle3"
    speculators = "speculators"


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Serve a model: every flag of vllm serve, and --aurora-* (--aurora-help lists them).",
)
def serve(context: typer.Context) -> None:
    raise typer.Exit(entrypoint.main(context.args))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or a directory of checkpoints: then its newest")],
    out: Annotated[Path, typer.Argument(help="directory to make")],
    form: Annotated[ExportFormat, typer.Option("--format", help="whose files")] = ExportFormat.eagle3,
    verifier: Annotated[
        str | None, typer.Option(help="speculators: the target's name [default: what the checkpoint says]")
    ] = None,
) -> None:
    """Write a learned draft for plain vLLM: --speculative-config '{"method": "eagle3", "model": OUT, ...}'."""
    from aurora_vllm.export import export as write

    try:
        source = write(checkpoint, out, form.value, verifier)
    except AuroraError as error:
        raise typer.Exit(report(error)) from None
    print(f"{source} -> {out} ({form})")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; its exit code. Bad input is one line on stderr and 2."""
    try:
        code = typer.main.get_command(app).main(args=argv, prog_name="aurora-vllm", standalone_mode=False)
    except typer.TyperException as error:
        return report(AuroraError(error.format_message().rstrip("."), "see aurora-vllm --help"))
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
