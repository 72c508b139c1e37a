"""Plugin libraries of small models, the harness and the fake driver, each built once a session."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from filelock import FileLock
from helpers import plugin_harness
from helpers.plugin_nodes import BUFFERED, JET_TINY, MINI

from jet_export.model.config import JetNemotronConfig
from jet_export.plugins.cases import Case, model_cases
from jet_export.plugins.harness.build import harness_library
from jet_export.plugins.headers import cache_dir
from jet_export.plugins.library import NAME, build_library


@dataclass
class Built:
    folder: Path
    library: Path
    harness: Path
    fake: Path
    cases: list[Case]
    sms: list[int]


@pytest.fixture(scope="session")
def tools(headers, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("harness")
    cuda = Path(triton.__file__).parent / "backends/nvidia/include"
    soname = "-Wl,-soname,libcuda.so.1"
    return harness_library(headers), plugin_harness.compile_shared(
        "fake_cuda.cpp", folder / "libfake.so", [cuda], soname
    )


def build(headers: Path, tools: tuple[Path, Path], cases: list[Case], sms: list[int]) -> Built:
    with FileLock(cache_dir() / "tests.lock"):  # workers of one test run: the first builds, the others find it
        folder = build_library(cases, sms, headers)
    return Built(folder, folder / NAME, *tools, cases, sms)


@pytest.fixture(scope="session")
def tiny(headers, tools) -> Built:
    """jet-tiny, bf16, SM 9.0."""
    return build(headers, tools, model_cases(JetNemotronConfig.from_json_file(JET_TINY)), [90])


@pytest.fixture(scope="session")
def mini(headers, tools) -> Built:
    """Odd sizes, bf16 state, FP8 cache, a window; two SMs."""
    return build(headers, tools, MINI, [89, 90])


@pytest.fixture(scope="session")
def buffered(headers, tools) -> Built:
    """Step buffers, drafts, a Gated DeltaNet and a partial rotary embedding; fp32, SM 9.0."""
    return build(headers, tools, BUFFERED, [90])
