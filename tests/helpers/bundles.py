"""The one bundle that the tests compile: jet-tiny in FP8 for the CPU, built once a test run."""

from pathlib import Path

import pytest

from helpers.built_once import built_once


def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "jet-tiny-fp8-inductor", _build)


def _build(output: Path) -> None:
    from jet_export.build.build import run_build
    from jet_export.build.plan import BuildOptions, make_plan

    options = BuildOptions(model="jet-tiny", device="cpu", fp8=True, max_batch_size=4, max_seq_len=1024, output=output)
    command = ["jet-export", "build", "--model", "jet-tiny", "--fp8", "--device", "cpu", "--max-batch-size", "4",
               "--max-seq-len", "1024", "--output", str(output)]  # fmt: skip
    run_build(make_plan(options), command, lambda line: None)
