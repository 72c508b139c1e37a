"""Fixtures shared by all tests; without a GPU the Triton kernels run in Triton's interpreter."""

import gc
import logging
import os
from pathlib import Path

import torch

HAS_CUDA = torch.cuda.is_available()
torch.set_num_threads(1)  # the models are small: a second thread mostly waits for the first
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
# An AOTInductor package's wrapper, which calls the kernels, takes the compiler longer than the kernels themselves.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
# pytest 9.2 adds its handler to loggers that do not propagate, and torch traces every export while this one has any.
logging.getLogger("torch.__trace").propagate = True

import pytest  # noqa: E402
from helpers.interpreter import patch_interpreter  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_interpreter()

# Modules that take long come first, in this order, so that no worker is left with one of them at the end. The first one
# builds the bundle that several need; those after it do without, until it is there.
LONG = (
    "server/triton/test_tritonserver.py",
    "search/test_real_search.py",
    "benchmarks/serving/test_soak.py",
    "backends/inductor/test_compile_worker.py",
    "backends/tensorrt/test_rtx.py",
    "server/ray/test_fleet.py",
    "plugins/test_model_sizes.py",
    "training/test_run.py",
    "postnas/test_run.py",
    "verify/test_verify.py",
    "ladder/test_ladder.py",
    "backends/onnx/test_export.py",
    "plugins/test_evaluator.py",
    "kernels/test_attention_kernels.py",
    "kernels/test_jet_block.py",
    "kernels/test_gated_delta_rule_backward.py",
    "server/openai/test_hostile.py",
    "quantization/test_quantize.py",
    "plugins/test_faults.py",
    "test_package.py",
    "bench/test_command.py",
    "verify/test_parity.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, m in enumerate(LONG) if item.path.as_posix().endswith(m)), len(LONG)))
    if HAS_CUDA:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: without it, every gc.collect() of an engine that is freed takes half a second."""
    gc.collect()
    gc.freeze()


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
