"""Keeps these tests from waiting for searches outside."""

import pytest


@pytest.fixture(autouse=True)
def own_machine(tmp_path_factory, monkeypatch) -> None:
    """A machine lock of the test's own."""
    from jet_export.search import locks

    lock = tmp_path_factory.mktemp("machine") / "machine.lock"
    monkeypatch.setattr(locks, "machine_lock", lambda: lock)
