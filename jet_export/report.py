"""What build, verify and inspect print."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from jet_export.bundle import Limits, Manifest, torch_dtype
from jet_export.errors import JetExportError
from jet_export.memory import Memory, engine_memory, human, parameter_count, weight_bytes
from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import checkpoint_licence, load_config
from jet_export.plan import BuildPlan
from jet_export.trt.flavors import FLAVORS

if TYPE_CHECKING:
    from jet_export.verify import Verification


def console() -> Console:
    """Wide enough for the tables where the output is a file."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def architecture(c: JetNemotronConfig) -> str:
    kinds = Counter(c.layer_types)
    layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return f"{parameter_count(c) / 1e6:,.1f} M parameters; layers: {layers}"


def print_plan(plan: BuildPlan) -> None:
    o, m = plan.options, plan.memory
    precision = "fp8 projections, the rest bfloat16" if plan.fp8 else str(plan.dtype).removeprefix("torch.")
    known = checkpoint_licence(plan.directory) if plan.directory is not None and not o.random_weights else None
    licence = "none (random weights)" if o.random_weights else known or "unknown: see the checkpoint's page"
    arch = plan.target["arch"] + (f" ({plan.target['gpu']})" if "gpu" in plan.target else "")
    rows = [
        ("model", f"{o.model}: {architecture(plan.config)}"),
        ("weights", f"{plan.source}, {human(m.weights)}"),
        ("licence", licence),
        ("precision", f"{precision}; KV cache {_name(plan.kv_dtype)}, state {_name(plan.state_dtype)}"),
        ("backend", f"{plan.backend.name} ({plan.backend.reason})"),
        ("device", f"{plan.target['device']} {arch}"),
        ("limits", f"{plan.limits.max_batch_size} sequences x {plan.limits.max_seq_len} tokens, "
                   f"prefill in chunks of {plan.limits.prefill_chunk}"),
        ("memory", f"{human(m.total)} running; about {human(plan.build_memory)} to build"),
        ("disk", human(plan.disk_bytes) + (f", download {human(plan.download_bytes)}" if plan.download_bytes else "")),
        ("time", f"about {plan.seconds:.0f} s, most of it compiling"),
        ("output", str(plan.output)),
    ]  # fmt: skip
    out = console()
    for name, value in rows:
        out.print(f"{name:<10} {value}", markup=False)
    for warning in plan.warnings:
        out.print(f"warning    {warning}", markup=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def memory_table(m: Memory) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("memory")
    table.add_column("bytes", justify="right")
    for name, value in (
        ("weights", m.weights),
        ("recurrent states", m.recurrent_states),
        ("convolution states", m.conv_states),
        ("KV cache, full attention", m.kv_full),
        ("KV cache, sliding windows", m.kv_window),
        ("RoPE table", m.rope_table),
        ("workspace of a prefill step (estimate)", m.workspace),
        ("total", m.total),
    ):
        table.add_row(name, human(value))
    return table


def check_inspect(
    bundle: Path | None, model: str | None, batch: int | None, context: int | None, fp8: bool,
    kv_cache_dtype: str, state_dtype: str, prefill_chunk: int | None, tpot_ms: float | None, measured: Path | None,
) -> None:  # fmt: skip
    """Raises JetExportError for options of inspect that make no sense, or none together."""
    if (bundle is None) == (model is None):
        raise JetExportError("inspect: give a bundle or --model, one of the two.")
    for flag, number in (("--batch", batch), ("--context", context), ("--prefill-chunk", prefill_chunk)):
        if number is not None and number < 1:
            raise JetExportError(f"inspect {flag} {number}: must be at least 1.")
    for flag, value, known in (
        ("--kv-cache-dtype", kv_cache_dtype, ("auto", "bfloat16", "fp8")),
        ("--state-dtype", state_dtype, ("float32", "bfloat16")),
    ):
        if value not in known:
            raise JetExportError(f"inspect {flag} {value}: not known.", f"Known: {', '.join(known)}.")
    asked = (
        ("--fp8", fp8), ("--kv-cache-dtype", kv_cache_dtype != "auto"), ("--state-dtype", state_dtype != "float32"),
        ("--prefill-chunk", prefill_chunk is not None),
    )  # fmt: skip
    if bundle is not None and (flags := [flag for flag, given in asked if given]):
        raise JetExportError(f"inspect {flags[0]}: belongs to --model; a bundle has its own.", "Leave it out.")
    if measured is not None and tpot_ms is None:
        raise JetExportError("inspect --measured: belongs to --tpot-ms.", "Add --tpot-ms 20, or leave it out.")
    if batch is not None and tpot_ms is not None:
        raise JetExportError("inspect --batch: --tpot-ms finds the batch itself.", "Leave one of the two out.")
    if tpot_ms is not None and (context is None or not 0 < tpot_ms < math.inf):
        raise JetExportError("inspect --tpot-ms: needs --context and a positive time.", "--context 65536 --tpot-ms 20")


def inspect_model(
    model: str, batch: int, context: int | None, fp8: bool, kv_cache_dtype: str, state_dtype: str, chunk: int
) -> None:
    """Memory of an architecture that is not built yet."""
    config = load_config(model)
    dtype = torch.bfloat16
    kv = dtype if kv_cache_dtype == "auto" else torch_dtype(kv_cache_dtype)
    length = context or config.max_position_embeddings
    limits = Limits(batch, length, min(chunk, length))
    memory = engine_memory(config, limits, dtype, kv, torch_dtype(state_dtype), weight_bytes(config, dtype, fp8))
    out = console()
    out.print(f"{model}: {architecture(config)}", markup=False)
    out.print(f"{batch} sequences x {length} tokens, {'FP8' if fp8 else 'bf16'} weights, "
              f"KV cache {_name(kv)}, state {state_dtype}", markup=False)  # fmt: skip
    out.print(memory_table(memory))


def inspect_bundle(bundle: Path, batch: int | None, context: int | None) -> None:
    """A built bundle: its limits, layers and precisions, files, and memory."""
    m = Manifest.load(bundle)
    c = m.config
    batch, context = batch or m.limits.max_batch_size, context or m.limits.max_seq_len
    out = console()
    out.print(f"{m.model['name']}: {architecture(c)}", markup=False)
    out.print(f"backend {m.backend['name']} (torch {m.backend['torch']}) for {m.target['arch']}; built "
              f"{m.build['date']} in {m.build['seconds']} s by: {m.rebuild_command}", markup=False)  # fmt: skip
    out.print(
        f"limits: {m.limits.max_batch_size} sequences x {m.limits.max_seq_len} tokens, chunk {m.limits.prefill_chunk}"
    )
    for warning in m.warnings:
        out.print(f"warning: {warning}", markup=False)
    out.print(layer_precisions(bundle))
    if m.backend["name"] in FLAVORS:
        print_engine(bundle, m, out)
    files = Table(box=None, header_style="bold")
    files.add_column("file")
    files.add_column("bytes", justify="right")
    for name, entry in m.files.items():
        files.add_row(name, human(entry["bytes"]))
    out.print(files)
    limits = Limits(batch, context, min(m.limits.prefill_chunk, context))
    kv, state = torch_dtype(m.kv_cache_dtype), torch_dtype(m.state_dtype)
    weights = m.files["weights.safetensors"]["bytes"]
    out.print(f"{batch} sequences x {context} tokens:")
    out.print(memory_table(engine_memory(c, limits, torch_dtype(m.dtype), kv, state, weights)))


def print_prediction(
    bundle: Path | None,
    model: str | None,
    context: int | None,
    tpot_ms: float,
    measured: Path | None,
    dtypes: tuple[bool, str, str],  # with --model: fp8, KV cache, state
    chunk: int,  # with --model
) -> None:
    """The largest batch that keeps a time per token, from a measured table. Raises JetExportError without a table."""
    from jet_export.speed import predict as p
    from jet_export.speed.rows import precision_name, precision_of

    assert context is not None  # check_inspect
    if bundle is not None:
        m = Manifest.load(bundle)
        name, c, precision, chunk = m.model["name"], m.config, precision_of(m), m.limits.prefill_chunk
        names, weights = (m.dtype, m.kv_cache_dtype, m.state_dtype), m.files["weights.safetensors"]["bytes"]
    else:
        assert model is not None
        fp8, kv, state = dtypes
        name, c = model, load_config(model)
        names = ("bfloat16", "bfloat16" if kv == "auto" else _name(torch_dtype(kv)), state)
        precision = precision_name(fp8, *names)
        weights = weight_bytes(c, torch.bfloat16, fp8)
    table = p.find_table(name, precision, measured)
    found = p.predict(c, names, weights, table, context, tpot_ms, table.available(), chunk)
    out = console()
    for line in p.lines(found, table, context, tpot_ms):
        out.print(line, markup=False)
    if found.memory is not None:
        out.print(memory_table(found.memory))


def print_engine(bundle: Path, m: Manifest, out: Console) -> None:
    """Of a TensorRT engine: whether it was verified, and the layers that it really has, by profile."""
    from jet_export.trt.build import REPORT
    from jet_export.trt.layers import LayerReport, rows
    from jet_export.trt.profiles import NAMES

    flavor = FLAVORS[m.backend["name"]]
    verified = m.build["verified"]
    how = f"verified at the build on {verified['device']}" if verified["passed"] else f"NOT verified: {verified['why']}"
    out.print(f"{flavor.title} {m.backend[flavor.backend]}; {how}", markup=False)
    table = Table(box=None, header_style="bold")
    for column in ("layers of the engine", "node", "precision"):
        table.add_column(column)
    for name in NAMES:
        table.add_column(name, justify="right")
    for row in rows(LayerReport.load(bundle / REPORT)):
        table.add_row(row.what, row.name, row.precision, *map(str, row.counts))
    out.print(table)


def layer_precisions(bundle: Path) -> Table:
    """Every projection's precision and size, read from the weights file itself; equal layers share a row."""
    from safetensors import safe_open

    groups: dict[tuple[str, str, str], list[int]] = {}
    with safe_open(bundle / "weights.safetensors", "pt") as f:
        for name in f.keys():  # noqa: SIM118  not a dict
            t = f.get_slice(name)
            if len(t.get_shape()) != 2 or name == "cos_sin":
                continue
            parts = name.split(".")
            layer = int(parts[1]) if parts[0] == "layers" else -1
            short = ".".join(parts[2:-1] if layer >= 0 else parts[:-1]) or name
            groups.setdefault((short, t.get_dtype(), "x".join(map(str, t.get_shape()))), []).append(layer)
    table = Table(box=None, header_style="bold")
    for column in ("projection", "precision", "shape", "layers"):
        table.add_column(column)
    for (short, dtype, shape), layers in sorted(groups.items(), key=lambda kv: kv[0]):
        table.add_row(short, dtype, shape, ranges(layers) if layers != [-1] else "")
    return table


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


SHOWN_FAILURES = 12


def print_verification(v: Verification) -> None:
    out = console()
    out.width = max(out.width, 112)
    out.print(v.table())
    failures = v.failures()
    for line in failures[:SHOWN_FAILURES]:
        out.print(line, markup=False)
    if len(failures) > SHOWN_FAILURES:
        out.print(f"and {len(failures) - SHOWN_FAILURES} more (--json FILE writes them all)", markup=False)
    out.print("PASSED" if v.passed else "FAILED", markup=False)
