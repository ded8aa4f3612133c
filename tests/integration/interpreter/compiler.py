"""What Triton wants of a backend besides a driver. No kernel ever gets here."""

from __future__ import annotations

from typing import Any, NoReturn

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpreterBackend(BaseBackend):
    """Compiles nothing."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> NoReturn:
        raise RuntimeError("a kernel was to be compiled; is TRITON_INTERPRET=1 set?")

    def add_stages(self, stages: Any, options: Any, language: Any) -> NoReturn:
        raise RuntimeError("a kernel was to be compiled; is TRITON_INTERPRET=1 set?")

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict[str, Any]:
        return {}
