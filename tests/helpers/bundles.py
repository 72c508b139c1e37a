"""The one bundle that the tests compile: jet-tiny in FP8 for the CPU, built once a test run, by the installed wheel."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.built_once import built_once
from helpers.installed import Installed

LIMITS = ("--max-batch-size", "4", "--max-seq-len", "1024")


def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    installed = Installed(tmp_path_factory) if find_spec("build") else None
    return built_once(tmp_path_factory, "jet-tiny-fp8-inductor", lambda output: _build(output, installed))


def _build(output: Path, installed: Installed | None) -> None:
    command = [
        "jet-export",
        "build",
        "--model",
        "jet-tiny",
        "--fp8",
        "--device",
        "cpu",
        *LIMITS,
        "--output",
        str(output),
    ]
    if installed:
        built = installed(*command)
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
        return
    from jet_export.build.build import run_build
    from jet_export.build.plan import BuildOptions, make_plan

    options = BuildOptions(model="jet-tiny", device="cpu", fp8=True, max_batch_size=4, max_seq_len=1024, output=output)
    run_build(make_plan(options), command, lambda line: None)
