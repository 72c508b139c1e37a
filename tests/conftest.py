"""Fixtures shared by all tests; without a GPU the Triton kernels run in Triton's interpreter."""

import os
from pathlib import Path

import torch

HAS_CUDA = torch.cuda.is_available()
torch.set_num_threads(1)  # the models are small: a second thread mostly waits for the first
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(scope="session")
def headers() -> Path:
    """TensorRT's headers; fetched where none are, as CI does."""
    from jet_export.plugins.headers import fetch_headers, find_headers
    from jet_export.utils.errors import JetExportError

    try:
        return find_headers()
    except JetExportError:
        try:
            return fetch_headers()
        except JetExportError as e:
            pytest.skip(f"no TensorRT headers, and none to be had: {e}")
