"""Lets these tests import their own helpers, and keeps them from waiting for searches outside."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def own_machine(tmp_path_factory, monkeypatch) -> None:
    """A machine lock of the test's own."""
    from jet_export.search import locks

    lock = tmp_path_factory.mktemp("machine") / "machine.lock"
    monkeypatch.setattr(locks, "machine_lock", lambda: lock)
