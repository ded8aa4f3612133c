"""The ``aurora-vllm`` command: ``serve`` is ``python -m aurora_vllm.entrypoint``, ``export`` writes a learned draft,
``check-vllm`` compares a vLLM with the one that the tests ran.

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
from aurora_vllm.errors import AuroraError, one_line_for_os_errors, report
from aurora_vllm.versions import versions

app = typer.Typer(add_completion=False, help="vLLM's server with a speculator that learns.")


class ExportFormat(StrEnum):
    eagle3 = "eagle3"
    speculators = "speculators"


def _say_versions(wanted: bool) -> None:
    if wanted:
        print(", ".join(f"{name} {found}" for name, found in versions().items()))
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_versions, is_eager=True, help="Print the versions of this package and of vLLM."
        ),
    ] = False,
) -> None: ...


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
        with one_line_for_os_errors():
            source = write(checkpoint, out, form.value, verifier)
    except AuroraError as error:
        raise typer.Exit(report(error)) from None
    print(f"{source} -> {out} ({form})")


@app.command()
def check_vllm(
    sources: Annotated[
        Path | None, typer.Option(help="a wheel, or a directory with vllm in it [default: the installed vLLM]")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="the version to compare with [default: its own, else the tested one]")
    ] = None,
) -> None:
    """Say of every vLLM symbol that Aurora wraps: same, changed or missing. Exit code 1 where one is missing."""
    from aurora_vllm.spec_decode import compat
    from aurora_vllm.spec_decode.vllm_sources import VllmSources

    try:
        vllm = VllmSources(sources) if sources else VllmSources.installed()
        version = against or (vllm.version if compat.known_fingerprints(vllm.version) else compat.WAS_RUN[-1])
        known = compat.known_fingerprints(version)
        if not known:
            raise AuroraError(f"there is no manifest of vLLM {version}", f"compare with {', '.join(compat.WAS_RUN)}")
    except AuroraError as error:
        raise typer.Exit(report(error)) from None
    findings = compat.compare(vllm, known)
    print(f"vLLM {vllm.version}, compared with {version} ({'run' if version in compat.WAS_RUN else 'only read'})")
    for finding in findings:
        print(f"{finding.state:8}{finding.symbol}{': ' * bool(finding.detail)}{finding.detail}")
    raise typer.Exit(1 if any(finding.state == "missing" for finding in findings) else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; its exit code. Bad input is one line on stderr and 2."""
    try:
        code = typer.main.get_command(app).main(args=argv, prog_name="aurora-vllm", standalone_mode=False)
    except typer.TyperException as error:
        return report(AuroraError(error.format_message().rstrip("."), "see aurora-vllm --help"))
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
