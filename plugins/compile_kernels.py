"""Compiles the kernels of some cases for some GPU architectures, without a GPU: cubins and a readable C++ table.

    python -m jet_export.plugins.compile_kernels SPEC.json DIRECTORY        (with Triton's interpreter off)

SPEC holds {"cases": [...], "sms": [90, ...]}. Written to DIRECTORY: kernels.inc (the table and the launches),
kernels.json, kernels.md (a readable table) and one .cubin per kernel and SM. A kernel that needs more shared memory
than an SM has is compiled with fewer pipeline stages for that SM; if even one stage does not fit, the build fails.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jet_export.kernels.configs import use_sm
from jet_export.plugins.cubin import parameters
from jet_export.plugins.emit import emit
from jet_export.plugins.kernel import Image, Kernel, kernel_of
from jet_export.plugins.table import TABLE, readable_table
from jet_export.plugins.targets import FIRST_FP8, SHARED, known_sms, sm_name
from jet_export.utils.errors import JetExportError

PARAMETER_BYTES = {"fp32": 4, "i32": 4}  # pointers: 8
SCRATCH = 2  # Triton appends two pointers, to global and to profiling scratch


def stages_of(kernel: Kernel) -> list[Kernel]:
    """The kernel as its launcher configures it, then variants with one pipeline stage less each, down to one."""
    constants, options = dict(kernel.constexprs), dict(kernel.options)
    most = max(constants.get("STAGES", 1), options.get("num_stages", 3))
    found = [kernel]
    for n in range(most - 1, 0, -1):
        fewer = {"STAGES": min(n, constants["STAGES"])} if "STAGES" in constants else {}
        asked = options | {"num_stages": min(n, options.get("num_stages", 3))}
        found.append(replace(kernel, constexprs=tuple((constants | fewer).items()), options=tuple(asked.items())))
    return found


def compile_image(function: Any, kernel: Kernel, sm: int) -> Image:
    """The kernel compiled for one SM. Raises JetExportError naming both if that is not possible."""
    if sm not in SHARED:
        raise JetExportError(f"SM {sm_name(sm)}: its shared memory is not known here.", f"Known: {known_sms()}.")
    if sm < FIRST_FP8 and any(kind == "*fp8e4nv" for _, kind in kernel.signature):
        raise JetExportError(
            f"{kernel.name}: SM {sm_name(sm)} has no FP8, which needs 8.9 or later.",
            "Use a cache in the model's dtype for it, or leave this SM out.",
        )
    needed = 0
    for fewer, variant in enumerate(stages_of(kernel)):
        compiled = compile_variant(function, variant, sm)
        meta = compiled.metadata
        needed = meta.shared
        if meta.global_scratch_size or meta.profile_scratch_size:
            raise JetExportError(
                f"{kernel.name} on SM {sm_name(sm)} wants scratch memory, which the plugin has none of."
            )
        if needed <= SHARED[sm]:
            clusters = getattr(meta, "num_ctas", 1)
            cubin = compiled.asm["cubin"]
            check_layout(kernel, cubin)
            return Image(sm, meta.shared, 32 * meta.num_warps, clusters, fewer, cubin)
    raise JetExportError(
        f"{kernel.text()} needs {needed} bytes of shared memory, SM {sm_name(sm)} has {SHARED[sm]}.",
        "Leave this SM out, or change the configuration in the kernel's file.",
    )


def compile_variant(function: Any, kernel: Kernel, sm: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.divisible}
    source = ASTSource(function, dict(kernel.signature), dict(kernel.constexprs), attrs)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(kernel.options))


def expected_sizes(kernel: Kernel) -> list[int]:
    kinds = [kind for _, kind in kernel.signature if kind != "constexpr"]
    return [PARAMETER_BYTES.get(kind, 8) for kind in kinds] + [8] * SCRATCH


def check_layout(kernel: Kernel, cubin: bytes) -> None:
    """Raises JetExportError unless the cubin's parameters have the sizes that the launches pass."""
    found = [size for _, size in parameters(cubin, kernel.name)]
    if found != expected_sizes(kernel):
        raise JetExportError(
            f"{kernel.name}: parameters of {found} bytes, the launcher passes {expected_sizes(kernel)}."
        )


def compile_cases(cases: list[Any], sms: list[int], folder: Path, progress: Any = None) -> None:
    """Writes the files of the module's docstring for these cases (cases.Case)."""
    from jet_export.plugins.cases import forms_of

    functions: dict[Kernel, Any] = {}
    traces = []
    for case in cases:
        with use_sm(sms[0] if len(sms) == 1 else None):  # one set of launches serves all SMs
            forms = {form: case.trace(form) for form in forms_of(case)}
        traces.append((case, forms))
        for launch in (launch for trace in forms.values() for launch in trace.launches):
            functions.setdefault(kernel_of(launch), launch.kernel)
    images: dict[Kernel, list[Image]] = {}
    for i, (kernel, function) in enumerate(functions.items()):
        images[kernel] = [compile_image(function, kernel, sm) for sm in sorted(sms)]
        if progress:
            progress(i + 1, len(functions), kernel.name)
    folder.mkdir(parents=True, exist_ok=True)
    report = []
    for i, (kernel, compiled) in enumerate(images.items()):
        for image in compiled:
            (folder / f"{i}_{image.sm}.cubin").write_bytes(image.cubin)
        found = [{k: v for k, v in asdict(image).items() if k != "cubin"} for image in compiled]
        report.append({**asdict(kernel), "parameters": expected_sizes(kernel), "images": found})
    (folder / "kernels.json").write_text(json.dumps(report, indent=1))
    (folder / "kernels.inc").write_text(emit(traces, images))
    (folder / TABLE).write_text(readable_table(traces, images))


def main(spec: str, folder: str) -> int:
    from jet_export.plugins.cases import case_from_dict

    values = json.loads(Path(spec).read_text())
    cases = [case_from_dict(case) for case in values["cases"]]
    try:
        compile_cases(cases, values["sms"], Path(folder), lambda i, n, name: print(f"[{i}/{n}] {name}", flush=True))
    except JetExportError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
