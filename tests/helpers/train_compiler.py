"""Compiles the training kernels to sm_90, as kernel_compiler.py does the others.

`python train_compiler.py DTYPE CASE ...`, a case being a JetBlock's HxKxV, or linear_kl.

Prints one JSON list of {"kernel", "shared", "scratch", "f64", "registers", "stack", "transposed"}; the last counts the
transposes of products' results in registers. Triton's interpreter must be off.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests, for helpers
from helpers import kernel_compiler
from helpers.kernel_compiler import Compiling
from helpers.paths import with_helpers


def compile_report(cases: list[str], dtype: str = "bfloat16") -> list[dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, __file__, dtype, *cases],
        env=with_helpers(TRITON_INTERPRET="0"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return report


class CountingTransposes(Compiling):
    def compile(self, *args: Any, **options: Any) -> None:
        counts: list[int] = []
        compile_for_sm_90 = kernel_compiler.compile_for_sm_90

        def counting(*source: Any) -> Any:
            compiled = compile_for_sm_90(*source)
            counts.append(len(re.findall(r"tt\.trans .*: tensor<[^>]*#mma", compiled.asm["ttgir"])))
            return compiled

        with patch.object(kernel_compiler, "compile_for_sm_90", counting):
            super().compile(*args, **options)
        self.report[-1]["transposed"] = max(counts)


class Launched:
    """Stands in for a kernel: `kernel[grid](...)` compiles."""

    def __init__(self, kernel: Any, compiling: Compiling) -> None:
        self.kernel, self.compiling = kernel, compiling

    def __getitem__(self, grid: Any) -> Any:
        return self.compiling(self.kernel).compile


def compiling_in(*modules: ModuleType) -> Compiling:
    """What the launchers in these modules launch from now on is compiled instead."""
    from triton.runtime.jit import JITFunction

    compiling = CountingTransposes()
    for module in modules:
        for name, value in list(vars(module).items()):
            kernel = value.kernel if isinstance(value, Launched) else value  # of the case before
            if name.endswith("_kernel") and isinstance(kernel, JITFunction):
                setattr(module, name, Launched(kernel, compiling))
    return compiling


def compile_jet_block(shape: str, dtype: str) -> list[dict[str, Any]]:
    """The backward pass of jet_block_train, which launches the forward kernels too; nothing is computed, so the tensors
    have no memory."""
    import torch

    from jet_export.kernels import (
        configs,
        dynamic_conv_backward,
        gated_delta_rule_backward,
        gated_delta_rule_train_chunk,
        gated_rms_norm_backward,
        jet_block_backward,
    )

    H, K, V = map(int, shape.split("x"))
    T, N, D = 4096, 4, H * V
    model_dtype: torch.dtype = getattr(torch, dtype)

    def empty(*shape: int, dtype: torch.dtype = model_dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    f32 = torch.float32
    block = jet_block_backward.Block(
        empty(T, 2 * H * K + 2 * D), empty(T, 2 * H), empty(T, 4 * D), empty(H, dtype=f32), empty(H, dtype=f32),
        empty(V), empty(N + 1, dtype=torch.int32), empty(N, H, K, V, dtype=f32), jet_block_backward.Dims(H, K, V), 1e-5,
    )  # fmt: skip
    modules = dynamic_conv_backward, gated_delta_rule_backward, gated_delta_rule_train_chunk, gated_rms_norm_backward
    compiling = compiling_in(*modules)
    with configs.use_sm(90):
        jet_block_backward.backward_triton(block, empty(T, D), empty(N, H, K, V, dtype=f32))
    return compiling.report


def compile_linear_kl(dtype: str) -> list[dict[str, Any]]:
    """Qwen2.5's vocabulary, at a temperature."""
    import torch

    from jet_export.kernels import linear_kl

    z = torch.empty(64, 151936, dtype=getattr(torch, dtype), device="meta")
    labels, scales = torch.empty(64, dtype=torch.int64, device="meta"), torch.empty(2, device="meta")
    compiling = compiling_in(linear_kl)
    linear_kl.kl_rows_triton(z, z, labels, scales, 2.0, True)
    return compiling.report


def compile_case(case: str, dtype: str) -> list[dict[str, Any]]:
    return compile_linear_kl(dtype) if case == "linear_kl" else compile_jet_block(case, dtype)


if __name__ == "__main__":
    print(json.dumps([entry for case in sys.argv[2:] for entry in compile_case(case, sys.argv[1])]))
