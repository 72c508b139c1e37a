"""`pytest tests/verify --bundle DIR` verifies that bundle; without the option a small one is built."""

from pathlib import Path

import pytest
from helpers.bundles import tiny_bundle


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bundle", type=Path, help="the bundle that tests/verify verifies")


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = request.config.getoption("bundle", default=None)
    return given if given is not None else tiny_bundle(tmp_path_factory)
