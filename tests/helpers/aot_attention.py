"""Compiles the launches of jet::attention to sm_90 on a machine without a GPU, and prints what they use as JSON.

python aot_attention.py bfloat16-128-1152 float8_e4m3fn-128-0 ...      with TRITON_INTERPRET=0: cache, head_dim, window
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.aot import f64_arithmetic, resources
from helpers.paged import make_case
from jet_export.kernels import attention_decode, attention_prefill, rope_append


class Compiling:
    """Stands in for `wrap(kernel)[grid](...)`: compiles for the arguments' types and launches nothing."""

    def __init__(self) -> None:
        self.report: list[dict] = []

    def __call__(self, kernel: Any) -> Any:
        self.kernel = kernel
        return self

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, **options: Any) -> None:
        names, params = self.kernel.arg_names, self.kernel.params
        values = dict(zip(names, args, strict=False)) | {n: options.pop(n) for n in names if n in options}
        constexprs = {p.name: values[p.name] for p in params if p.is_constexpr}
        signature = {n: "constexpr" if n in constexprs else mangle_type(values[n]) for n in names}
        divisible = [
            i
            for i, p in enumerate(params)
            if not p.is_constexpr
            and (torch.is_tensor(values[p.name]) or not (p.do_not_specialize or values[p.name] % 16))
            and not isinstance(values[p.name], float)
        ]
        attrs = {(i,): [["tt.divisibility", 16]] for i in divisible}
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        meta = compiled.metadata
        scratch = meta.global_scratch_size + meta.profile_scratch_size
        f64 = f64_arithmetic(self.kernel, signature, constexprs, attrs, options)
        used = {"shared": meta.shared, "scratch": scratch, "f64": f64, **resources(compiled.asm["cubin"])}
        self.report.append({"kernel": self.kernel.__name__, "head_dim": constexprs["DH"], **used})


def compile_launches(cases: list[str]) -> list[dict]:
    """Each case: CACHE_DTYPE-HEAD_DIM-WINDOW."""
    compiling = Compiling()
    for module in (attention_decode, attention_prefill, rope_append):
        module.wrap = compiling
    for case in cases:
        name, head_dim, window = case.split("-")
        cache_dtype = getattr(torch, name)
        dtype = torch.bfloat16 if cache_dtype == torch.float8_e4m3fn else cache_dtype
        c = make_case([1, 1], [0, 9], (12, 2), int(head_dim), 128, dtype, cache_dtype, window=int(window))
        c.run("prefill", small=False)
        c.run("decode", small=False)
    return compiling.report


if __name__ == "__main__":
    print(json.dumps(compile_launches(sys.argv[1:])))
