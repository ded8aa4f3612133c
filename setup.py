"""What pyproject.toml cannot say: a wheel carries patches/ (fingerprints of what is wrapped) inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPatches(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout finds them where they are
            for manifest in Path("patches").glob("*.json"):
                target = Path(self.build_lib) / "aurora_vllm" / "patches" / manifest.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(manifest, target)


setup(cmdclass={"build_py": BuildWithPatches})
