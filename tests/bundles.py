"""The one bundle that the tests compile: jet-tiny in FP8 for the CPU, built once a session."""

from pathlib import Path

import pytest

_built: list[Path] = []


def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not _built:
        from jet_export.build import run_build
        from jet_export.plan import BuildOptions, make_plan

        output = tmp_path_factory.mktemp("bundles") / "jet-tiny-fp8-inductor"
        options = BuildOptions("jet-tiny", device="cpu", fp8=True, max_batch_size=4, max_seq_len=1024, output=output)
        command = ["jet-export", "build", "--model", "jet-tiny", "--fp8", "--device", "cpu", "--max-batch-size", "4",
                   "--max-seq-len", "1024", "--output", str(output)]  # fmt: skip
        _built.append(run_build(make_plan(options), command, lambda line: None))
    return _built[0]
