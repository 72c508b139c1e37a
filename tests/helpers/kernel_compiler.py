"""Compiles the kernels that launchers launch to sm_90, on a machine without a GPU, and reads what they use.

Triton's interpreter must be off, and it is chosen at import, so this is a program: `python kernel_compiler.py CASE ...`
prints one JSON list of {"kernel", "shared", "scratch", "f64", "registers", "stack"}. compile_report() runs it.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests, for helpers
from helpers.paths import with_helpers

MODELS = {"2b": (12, 96, 256), "4b": (16, 128, 256), "qwen3.5_4b": (32, 128, 128)}  # H, K, V
KEY_HEADS = {"qwen3.5_4b": 16}  # of a Gated DeltaNet


def compile_report(cases: list[str]) -> list[dict[str, Any]]:
    """Cases of jet_block are MODEL-DTYPE-STATE_DTYPE-MODE, as 4b-bfloat16-float32-prefill, MODEL a name or HxKxV; MODE
    prefill, decode, or with a step buffer and a ring held_decode, held_mixed, verify; codes_ before it: with out_scale.
    Those of attention are CACHE_DTYPE-HEAD_DIM-WINDOW, as float8_e4m3fn-128-0.
    """
    env = with_helpers(TRITON_INTERPRET="0")
    result = subprocess.run([sys.executable, __file__, *cases], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    report: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return report


class Compiling:
    """Stands in for `wrap(kernel)[grid](...)`: compiles for the arguments' types and launches nothing."""

    def __init__(self) -> None:
        self.report: list[dict[str, Any]] = []
        self.compiled: list[Any] = []

    def __call__(self, kernel: Any) -> Any:
        self.kernel = kernel
        return self

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, **options: Any) -> None:
        import torch
        from triton.runtime.jit import mangle_type

        names, params = self.kernel.arg_names, self.kernel.params
        values = dict(zip(names, args, strict=False)) | {n: options.pop(n) for n in names if n in options}
        constexprs = {p.name: values[p.name] for p in params if p.is_constexpr}
        signature = {n: "constexpr" if n in constexprs else mangle_type(values[n]) for n in names}

        def divisible(param: Any) -> bool:
            value = values[param.name]
            if param.is_constexpr or isinstance(value, float):
                return False
            return torch.is_tensor(value) or not (param.do_not_specialize or value % 16)

        attrs = {(i,): [["tt.divisibility", 16]] for i, param in enumerate(params) if divisible(param)}
        compiled = compile_for_sm_90(self.kernel, signature, constexprs, attrs, options)
        self.compiled.append(compiled)
        self.report.append(
            {
                "kernel": self.kernel.__name__,
                "shared": compiled.metadata.shared,
                "scratch": compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size,
                "f64": f64_arithmetic(self.kernel, signature, constexprs, attrs, options),
                **resources(compiled.asm["cubin"]),
            }
        )


def source_for_sm_90(kernel: Any, signature: dict, constexprs: dict, attrs: dict) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", 90, 32)
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(kernel, signature, constexprs, attrs), target
    return ASTSource(kernel, signature, constexprs, attrs), target


def compile_for_sm_90(kernel: Any, signature: dict, constexprs: dict, attrs: dict, options: dict) -> Any:
    import triton

    source, target = source_for_sm_90(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options)


def f64_arithmetic(kernel: Any, signature: dict, constexprs: dict, attrs: dict, options: dict) -> int:
    """fp64 operations of a kernel whose float arguments are fp64, as Inductor passes them."""
    if "fp32" not in signature.values():
        return 0
    wide = {name: "fp64" if kind == "fp32" else kind for name, kind in signature.items()}
    return f64_operations(optimised_ir(kernel, wide, constexprs, attrs, options))


def f64_operations(ir: str) -> int:
    """Those of Triton's IR that are not the conversion of an argument to fp32."""
    return len(re.findall(r"^ *%\S+ = (?!arith\.truncf %[a-z]\w* : f64).*f64\b", ir, re.MULTILINE))


def optimised_ir(kernel: Any, signature: dict, constexprs: dict, attrs: dict, options: dict) -> str:
    """Triton's own IR, a tenth of the time of a compilation."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    source, target = source_for_sm_90(kernel, signature, constexprs, attrs)
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    return str(stages["ttir"](source.make_ir(target, parsed, functions, modules, context), {}))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and stack bytes (spills), from cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"]}


def compiling_in(*modules: ModuleType) -> Compiling:
    """What the launchers in these modules launch from now on is compiled instead."""
    compiling = Compiling()
    for module in modules:
        module.__dict__["wrap"] = compiling
    return compiling


def compile_jet_block(model: str, dtype: str, state_dtype: str, mode: str) -> list[dict[str, Any]]:
    import torch

    from helpers.packed import Packed
    from jet_export.kernels import (
        configs,
        dynamic_conv,
        gated_delta_rule_chunk,
        gated_delta_rule_decode,
        gated_delta_rule_deferred,
        gated_delta_rule_verify,
        gated_rms_norm,
        jet_block,
        state_layout,
        step_buffer,
    )
    from jet_export.kernels.form import Form

    H, K, V = MODELS[model] if model in MODELS else map(int, model.split("x"))
    lens = [1, 1] if "decode" in mode else [64, 32] if "verify" not in mode else [3, 2]
    dtypes = {"dtype": getattr(torch, dtype), "state_dtype": getattr(torch, state_dtype)}
    p = Packed(lens, H=H, K=K, V=V, key_heads=KEY_HEADS.get(model, 0), **dtypes)
    rules = gated_delta_rule_chunk, gated_delta_rule_decode, gated_delta_rule_deferred, gated_delta_rule_verify
    compiling = compiling_in(*rules, gated_rms_norm, dynamic_conv, step_buffer)
    out_scale = torch.ones(1) if mode.startswith("codes_") else None
    mode = mode.removeprefix("codes_")
    buffer: tuple[Any, ...] = state_layout.NO_BUFFER
    if mode not in ("prefill", "decode"):
        S, rollback = len(p.recurrent_state), 5
        p.tensors["conv_state"] = torch.zeros(S, 3 + rollback, p.conv_state.shape[2], dtype=p.conv_state.dtype)
        rows = state_layout.buffer_rows(8, rollback)
        buffer = torch.zeros(S, H, rows, K + V + state_layout.EXTRA), torch.zeros(S, H, dtype=torch.int32), 8
    forms = {"prefill": Form.PREFILL, "held_mixed": Form.MIXED, "verify": Form.VERIFY}
    launcher: Any = jet_block.jet_block_triton
    with configs.use_sm(90):
        launcher(*p.block_args(forms.get(mode, Form.DECODE)), *buffer, out_scale)
    return compiling.report


def compile_attention(cache: str, head_dim: str, window: str) -> list[dict[str, Any]]:
    import torch

    from helpers.paged import make_case
    from jet_export.kernels import attention_decode, attention_prefill, attention_verify, rope_append

    cache_dtype = getattr(torch, cache)
    dtype = torch.bfloat16 if cache_dtype == torch.float8_e4m3fn else cache_dtype
    case = make_case([1, 1], [0, 9], (12, 2), int(head_dim), 128, dtype, cache_dtype, window=int(window))
    compiling = compiling_in(attention_decode, attention_prefill, attention_verify, rope_append)
    for form in ("prefill", "decode", "verify"):
        case.run(form, small=False)
    return compiling.report


def compile_case(case: str) -> list[dict[str, Any]]:
    parts = case.split("-")
    return compile_attention(*parts) if len(parts) == 3 else compile_jet_block(*parts)


if __name__ == "__main__":
    print(json.dumps([entry for case in sys.argv[1:] for entry in compile_case(case)]))
