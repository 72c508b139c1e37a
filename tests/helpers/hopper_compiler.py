"""Compiles the Hopper form of the gated delta rule to sm_90a without a GPU, as kernel_compiler.py does the others.

`python hopper_compiler.py CASE ...`, a case being FORM-DTYPE-H-HK-V-GATES, as wide-bfloat16-32-16-128-raw. It prints
one JSON list of what kernel_compiler.py reports of a kernel, with "wgmma", how many there are, and "warnings", what
ptxas says about their performance. Triton's interpreter must be off.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests, for helpers
from helpers.kernel_compiler import Compiling
from helpers.paths import with_helpers


def compile_report(cases: list[str]) -> list[dict[str, Any]]:
    env = with_helpers(TRITON_INTERPRET="0")
    result = subprocess.run([sys.executable, __file__, *cases], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    report: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return report


def warnings(ptx: str) -> list[str]:
    """ptxas's remarks about wgmma (C75xx)."""
    import triton

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [str(tool), "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [line for line in text.splitlines() if "(C75" in line]


def compile_case(case: str) -> dict[str, Any]:
    import torch

    from helpers.packed import Packed
    from jet_export.kernels import hopper_gated_delta_rule
    from jet_export.kernels.hopper_gated_delta_rule_kernel import hopper_delta_rule_kernel

    rule: Any = hopper_gated_delta_rule.hopper_delta_rule
    name, dtype, *sizes, gates = case.split("-")
    H, HK, V = map(int, sizes)
    form = hopper_gated_delta_rule.WIDE if name == "wide" else hopper_gated_delta_rule.NARROW
    p = Packed([64, 32], H=H, K=128, V=V, key_heads=HK, dtype=getattr(torch, dtype))
    *args, _ = p.rule_args(False)
    raw = (p.A_log, p.dt_bias) if gates == "raw" else None
    compiling = Compiling()
    with patch.object(hopper_gated_delta_rule, "kernel_for", lambda *_: compiling(hopper_delta_rule_kernel)):
        rule(*args[:9], head_dims=(H, 128, V), raw_gates=raw, key_heads=HK, silu=raw is not None, form=form)
    ptx = compiling.compiled[0].asm["ptx"]
    return {**compiling.report[0], "wgmma": ptx.count("wgmma.mma_async"), "warnings": warnings(ptx)}


if __name__ == "__main__":
    print(json.dumps([compile_case(case) for case in sys.argv[1:]]))
