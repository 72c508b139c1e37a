"""Speed of Gated DeltaNet's kernels at Qwen3.5's sizes in one table, beside FLA 0.6.0 and FlashInfer where installed.

    python benchmarks/kernels/gated_delta_net.py [--models qwen3.5-2b,qwen3.5-4b] [--output FILE]

Correctness comes first, and without it there are no figures. jet_block is everything between the projections: static
convolution, gates, delta rule, gated norm. The others have the delta rule alone and stand beside ours alone, over the
same inputs and states (gdn_baselines.py), each if its output and states are within 2 % of ours at this very size: all
work in bf16, which leaves each within 1 % of fp64. Else there is a note. States are fp32; all is timed in CUDA graphs,
decode's walks through several layers' states, so that they do not stay in L2. JSON is written after every case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arguments import lacks_gpu, output_of, parser_of
from block_cases import DECODE, MODELS, PREFILL, block_inputs, correctness, decode_work, prefill_work, rel, rule_work
from fla_pinned import import_fla
from gdn_baselines import (
    RuleCase,
    Run,
    fla_chunk,
    fla_recurrent,
    flashinfer_decode,
    flashinfer_prefill,
    import_flashinfer,
    ours,
)
from kernels_attention import in_turn
from kernels_table import KernelRow, measured_peaks, report, row, to_dicts

from jet_export.bench import timer
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.utils.environment import write_result

BOUND = 2e-2
Others = dict[str, Callable[[RuleCase], Run]]


def others(fla: Any, flashinfer: Any, decode: bool) -> Others:
    """What is compared with, by name."""
    found: Others = {}
    if fla is not None:
        found["fla 0.6.0"] = partial(fla_recurrent if decode else fla_chunk, fla)
    if flashinfer is not None:
        name = f"flashinfer {flashinfer.version}"
        if decode:
            for layout, value_first in (("[K, V]", False), ("[V, K]", True)):
                found[f"{name} {layout}"] = partial(flashinfer_decode, flashinfer, value_first=value_first)
        else:
            found[name] = partial(flashinfer_prefill, flashinfer)
    return found


def refusal(theirs: Callable[[RuleCase], Run], case: RuleCase, want: tuple[torch.Tensor, torch.Tensor]) -> str:
    """Why this one is not timed; empty: its output and states are ours, and on a GPU a CUDA graph takes it."""
    try:
        run = theirs(case.again())
        differences = [rel(x, y) for x, y in zip(run(), want, strict=True)]
        if case.q.is_cuda:
            timer.capture(run)
    except Exception as e:
        return f"{type(e).__name__}: {str(e).strip()[:80]}"
    return "" if max(differences) < BOUND else f"output and states differ by {differences[0]:.1e}, {differences[1]:.1e}"


def compare(model: str, lens: list[int], form: Form, libraries: Others, peaks: tuple[float, float]) -> list[KernelRow]:
    """A row of jet_block, then of the delta rule alone, ours and the others'."""
    decode, B = form is Form.DECODE, len(lens)
    rule, whole, layers = rule_work(sum(lens), model), prefill_work(sum(lens), model), 1
    if decode:
        moved, layers = decode_work(B, model, torch.float32)
        rule = whole = moved, 0
    sets = [block_inputs(lens, model, context=4) for _ in range(layers)]
    cases = [RuleCase.of(args, MODELS[model].HK) for args in sets]
    want = ours(cases[0].again(), form)()
    notes = {name: refusal(make, cases[0], want) for name, make in libraries.items()}
    del want
    variants: dict[str, Callable[[], Any]] = {
        "jet_block": in_turn([partial(torch.ops.jet.jet_block, *args, form, *NO_BUFFER, None) for args in sets]),
        "jet": in_turn([ours(case.again(), form) for case in cases]),
    }
    variants |= {
        name: in_turn([make(case.again()) for case in cases]) for name, make in libraries.items() if not notes[name]
    }
    times = timer.compare(variants, repeats=15, graph=True, calls=layers)
    split = "" if decode else ", ".join(f"{n} {ms:.3f}" for n, ms in timer.kernel_times(variants["jet_block"]).items())
    refused = "; ".join(f"{name}: {note}" for name, note in notes.items() if note)
    shape, what = f"B{B}" if decode else f"B{B} T{lens[0]}", " decode" if decode else ""
    out = []
    for name, t in times.items():
        case = (model, shape, "bf16, state fp32")
        if name == "jet_block":
            out.append(row(f"jet_block{what}", *case, "jet", t, *whole, *peaks, split))
        else:
            note = refused if name == "jet" else ""
            out.append(row(f"gated_delta_rule{what}", *case, name, t, *rule, *peaks, note))
    return out


def main() -> int:
    parser = parser_of(__doc__, "gated_delta_net")
    parser.add_argument("--models", default="qwen3.5-2b,qwen3.5-4b")
    options = parser.parse_args()
    models = options.models.split(",")
    known = [name for name, sizes in MODELS.items() if sizes.static]
    if unknown := set(models) - set(known):
        print(f"--models {min(unknown)}: no Gated DeltaNet of that name. Known: {', '.join(known)}.", file=sys.stderr)
        return 2
    if lacks_gpu("gated_delta_net.py"):
        return 2
    output = output_of(options)
    torch.manual_seed(0)
    result: dict[str, Any] = {"errors": {model: correctness(model) for model in models}, "bound": BOUND}
    if not all(e < 1e-2 for errors in result["errors"].values() for e in errors.values()):
        print(f"wrong results: no speed to report: {result}", file=sys.stderr)
        return 1
    fla, flashinfer = import_fla(), import_flashinfer()
    peaks = measured_peaks(result)
    rows: list[KernelRow] = []
    cases = [([1] * B, Form.DECODE) for B in DECODE] + [([T] * B, Form.PREFILL) for B, T in PREFILL]
    for model in models:
        for lens, form in cases:
            rows += compare(model, lens, form, others(fla, flashinfer, form is Form.DECODE), peaks)
            write_result(output, {**result, "rows": to_dicts(rows)})
            torch.cuda.empty_cache()
    report(output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
