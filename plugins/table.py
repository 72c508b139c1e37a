"""kernels.md: which kernels a plugin library holds, for which nodes, and the resources that each needs of an SM."""

from __future__ import annotations

from jet_export.kernels.form import Form
from jet_export.plugins.cases import FORMS, Case, label
from jet_export.plugins.kernel import Image, Kernel, kernel_of
from jet_export.plugins.symbolic import Trace
from jet_export.plugins.targets import SHARED, sm_name

TABLE = "kernels.md"
LAUNCHED = {Form.MIXED: "a mixed call", Form.DECODE: "one token a sequence", Form.VERIFY: "drafts verified"}


def readable_table(traces: list[tuple[Case, dict[Form, Trace]]], images: dict[Kernel, list[Image]]) -> str:
    """Markdown: nodes with the kernels they launch, in order; kernels with constexprs, shared memory and warps."""
    index = {kernel: i for i, kernel in enumerate(images)}
    columns = [form for form in FORMS if any(form in forms for _, forms in traces)] or list(FORMS)
    sms = sorted({image.sm for found in images.values() for image in found})
    lines = [
        "# Kernels of this plugin library",
        "",
        f"Compiled ahead of time for SM {', '.join(map(sm_name, sms))} from the Triton kernels of `kernels/`. A plugin",
        "chooses by attributes, dtypes, shapes and the GPU that it runs on, and refuses what no row fits.",
        "",
        "## Nodes",
        "",
        "| node | " + " | ".join(LAUNCHED[form] for form in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for case, forms in traces:
        kernels = {form: [str(index[kernel_of(launch)]) for launch in trace.launches] for form, trace in forms.items()}
        launches = [", ".join(kernels.get(form, [])) for form in columns]
        lines.append(f"| {label(case)} | {' | '.join(launches)} |")
    room = ", ".join(f"SM {sm_name(sm)} {SHARED[sm] >> 10} KB" for sm in sms)
    lines += [
        "",
        "## Kernels",
        "",
        f"Shared memory of a block, and its warps; a block may have {room}.",
        "",
        "| | kernel | configuration | " + " | ".join(f"SM {sm_name(sm)}" for sm in sms) + " |",
        "|---:|---|---|" + "---|" * len(sms),
    ]
    lines += [kernel_row(index[kernel], kernel, found, sms) for kernel, found in images.items()]
    return "\n".join(lines) + "\n"


def kernel_row(i: int, kernel: Kernel, found: list[Image], sms: list[int]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in (*kernel.constexprs, *kernel.options))
    by_sm = {image.sm: image for image in found}
    return f"| {i} | {kernel.name} | {settings} | " + " | ".join(resources(by_sm[sm]) for sm in sms) + " |"


def resources(image: Image) -> str:
    text = f"{image.shared / 1024:.1f} KB, {image.threads // 32} warps"
    if image.clusters > 1:
        text += f", clusters of {image.clusters}"
    if image.fewer_stages:
        text += f", {image.fewer_stages} pipeline stage{'s' if image.fewer_stages > 1 else ''} fewer"
    return text
