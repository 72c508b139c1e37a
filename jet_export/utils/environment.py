"""The environment of a result: GPU, CPU, driver, versions, date and commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from jet_export.utils.files import write_atomically
from jet_export.utils.version import __version__

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, where the package runs from one


def cpu_name() -> str:
    """The CPU's model, or its architecture where the system does not name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def is_checkout(root: Path) -> bool:
    """Whether `root` is a checkout of this project."""
    try:
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return False
    return (root / ".git").exists() and 'name = "jet-export"' in project


def source_commit() -> str:
    """The commit of the source: $JET_COMMIT, or that of the checkout that this package runs from.

    "unknown" for an installed package, and without git. Git is asked only about our own checkout: a repository around
    an installed package is another project's.
    """
    if commit := os.environ.get("JET_COMMIT"):
        return commit
    if not is_checkout(ROOT):
        return "unknown"
    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    env["GIT_CEILING_DIRECTORIES"] = str(ROOT.parent)
    try:
        git = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, env=env
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def version_lines() -> list[str]:
    """The output of `jet-export --version`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"jet-export {__version__} (commit {source_commit()})",
        f"torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda or 'none (a CPU build)'}",
        f"GPU {gpu}, Python {platform.python_version()}",
    ]


def environment() -> dict[str, str]:
    """What a result was measured with, as results record it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpu_bytes": str(torch.cuda.get_device_properties().total_memory) if torch.cuda.is_available() else "0",
        "driver": driver,
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": source_commit(),
    }


def device_slug() -> str:
    """The directory of results measured here: "h100", "h200", "rtx-4090"; "cpu" without a GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().removeprefix("NVIDIA ").removeprefix("GeForce ").lower().split()
    return "-".join(words[:2]) if words[0] in ("rtx", "tesla") else words[0]


def command_line() -> str:
    """How this process was started, as one types it in the checkout: paths of the machine are cut short."""
    return shown_command([*(["python"] if sys.argv[0].endswith(".py") else []), *sys.argv])


def shown_command(words: list[str]) -> str:
    """A command as a result quotes it: paths of the machine are cut short."""
    return shlex.join(_shown(word) for word in words)


def _shown(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write the environment, the command, unless the result has its own, and `result` as JSON."""
    whole = {"environment": environment(), "command": command_line(), **result}
    write_atomically(Path(path), json.dumps(whole, indent=1) + "\n")
