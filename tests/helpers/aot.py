"""Compiles a launcher's kernels to sm_90 on a machine without a GPU, and reads what they use.

Triton's interpreter must be off, and it is chosen at import: run as a script, `python aot.py CASE ...`, this prints one
JSON list of {"kernel", "shared", "scratch", "f64", "registers", "stack"}; compile_report() does that from a test.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = {"2b": (12, 96, 256), "4b": (16, 128, 256)}  # H, K, V


def compile_report(cases: list[str]) -> list[dict]:
    """A case: MODEL-DTYPE-STATE_DTYPE-prefill|decode, as 4b-bfloat16-float32-prefill; MODEL may be HxKxV."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, __file__, *cases], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


class Compiling:
    """Stands in for kernel[grid](...): compiles for the arguments' types and records, launches nothing."""

    def __init__(self, report: list, keep: dict):
        self.report, self.keep = report, keep

    def __call__(self, kernel: Any) -> Any:
        self.kernel = kernel
        return self

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        import torch
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {n: kwargs.pop(n) for n in names if n in kwargs}
        types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.uint8: "*u8"}
        signature, constexprs, attrs = {}, {}, {}
        for i, (name, param) in enumerate(zip(names, self.kernel.params, strict=True)):
            value = given[name]
            if param.is_constexpr:
                signature[name], constexprs[(i,)] = "constexpr", value
                continue
            scalar = "fp32" if isinstance(value, float) else "i32"
            signature[name] = types[value.dtype] if torch.is_tensor(value) else scalar
            if torch.is_tensor(value) or (isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize):
                attrs[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kwargs)
        meta = compiled.metadata
        self.keep[self.kernel.__name__] = compiled
        self.report.append(
            {
                "kernel": self.kernel.__name__,
                "shared": meta.shared,
                "scratch": meta.global_scratch_size + meta.profile_scratch_size,
                "f64": f64_arithmetic(self.kernel, signature, constexprs, attrs, kwargs),
                **resources(compiled.asm["cubin"]),
            }
        )


def f64_arithmetic(kernel: Any, signature: dict, constexprs: dict, attrs: dict, options: dict) -> int:
    """fp64 instructions, conversions aside, of a kernel whose float arguments are fp64, as Inductor passes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "fp32" not in signature.values():
        return 0
    wide = {name: "fp64" if kind == "fp32" else kind for name, kind in signature.items()}
    source = ASTSource(kernel, wide, constexprs, attrs)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return len(re.findall(r"^\s*(?!cvt|ld|mov|st)\w+[.\w]*\.f64", ptx, re.MULTILINE))


def resources(cubin: bytes) -> dict:
    """Registers a thread, and stack bytes (spills), from cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"]}


def compile_case(case: str) -> tuple[list, dict]:
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers.packed import Packed
    from jet_export.kernels import (
        configs,
        dynamic_conv,
        gated_delta_rule_chunk,
        gated_delta_rule_decode,
        gated_rms_norm,
        jet_block,
    )

    model, dtype, state_dtype, mode = case.split("-")
    if model in MODELS:
        H, K, V = MODELS[model]
    else:
        H, K, V = map(int, model.split("x"))
    lens = [1, 1] if mode == "decode" else [64, 32]
    p = Packed(lens, H=H, K=K, V=V, dtype=getattr(torch, dtype), state_dtype=getattr(torch, state_dtype))
    report, keep = [], {}
    for module in (gated_delta_rule_chunk, gated_delta_rule_decode, gated_rms_norm, dynamic_conv):
        module.wrap = Compiling(report, keep)
    with configs.use_sm(90):
        jet_block.jet_block_triton(*p.block_args(mode == "decode"))
    return report, keep


if __name__ == "__main__":
    print(json.dumps([entry for case in sys.argv[1:] for entry in compile_case(case)[0]]))
