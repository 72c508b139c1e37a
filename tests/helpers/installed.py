"""The package as users have it: the wheel, made from the sdist, in an environment outside of the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from helpers.built_once import built_once
from helpers.paths import ROOT

HIDDEN = ("PYTHONPATH", "TRITON_INTERPRET")


def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and of the wheel that was made from it."""
    return built_once(tmp_path_factory, "dist", _build)


def _build(folder: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]


class Installed:
    """A fresh environment with the wheel. Its other packages are this environment's, whose editable install of the
    checkout it does not see."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        wheel = next(distribution(tmp_path_factory).glob("*.whl"))
        self.folder = built_once(tmp_path_factory, "installed", lambda folder: _install(folder, wheel))

    def __call__(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs one of its programs there, with one thread, as the tests do."""
        environment = {k: v for k, v in os.environ.items() if k not in HIDDEN} | {"OMP_NUM_THREADS": "1"}
        words = [str(self.folder / "bin" / command[0]), *command[1:]]
        return subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)


def _install(folder: Path, wheel: Path) -> None:
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--ignore-installed", str(wheel)], check=True)
