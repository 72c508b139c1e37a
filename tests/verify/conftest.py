"""`pytest tests/parity --bundle DIR` verifies that bundle; without the option a small one is built."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.bundles import tiny_bundle


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bundle", type=Path, help="the bundle that tests/parity verifies")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small steps on shared cores: threads would wait for each other longer than they work. Packages keep the number
    of threads that they were compiled with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = request.config.getoption("bundle", default=None)
    return given if given is not None else tiny_bundle(tmp_path_factory)
