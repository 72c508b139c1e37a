"""Files that are built once a test run, by whichever worker needs them first."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's temporary directory, the same one for every pytest-xdist worker."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def built_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The path `name`, made by `make(path)` where it does not exist yet; `make` must put it in place whole."""
    path = shared_directory(tmp_path_factory) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path
