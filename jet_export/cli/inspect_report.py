"""What `jet-export inspect` prints: a bundle, an architecture to build, or the largest batch within a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jet_export.backends.tensorrt.flavors import FLAVORS
from jet_export.build.state_interval import table_interval
from jet_export.bundle.dtypes import Dtypes, dtype_name
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.bundle.memory import MemoryBudget, engine_memory, weight_bytes
from jet_export.cli.tables import architecture, memory_table
from jet_export.model.hub import load_config
from jet_export.plugins.targets import sm_name, sm_of_arch
from jet_export.utils.console import console, human
from jet_export.utils.errors import JetExportError

DEFAULT_CHUNK = 2048  # for --model


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The command line's options, one to one. Raises JetExportError for invalid ones, and for those that exclude each
    other."""

    bundle: Path | None
    model: str | None
    batch: int | None
    context: int | None
    fp8: bool
    kv_cache_dtype: str
    state_dtype: str
    prefill_chunk: int | None
    tpot_ms: float | None
    measured: Path | None

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.model is None):
            raise JetExportError("inspect: give a bundle or --model, one of the two.")
        for flag, number in (
            ("--batch", self.batch),
            ("--context", self.context),
            ("--prefill-chunk", self.prefill_chunk),
        ):
            if number is not None and number < 1:
                raise JetExportError(f"inspect {flag} {number}: must be at least 1.")
        for flag, value, known in (
            ("--kv-cache-dtype", self.kv_cache_dtype, ("auto", "bfloat16", "fp8")),
            ("--state-dtype", self.state_dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise JetExportError(f"inspect {flag} {value}: not known.", f"Known: {', '.join(known)}.")
        asked = (
            ("--fp8", self.fp8),
            ("--kv-cache-dtype", self.kv_cache_dtype != "auto"),
            ("--state-dtype", self.state_dtype != "float32"),
            ("--prefill-chunk", self.prefill_chunk is not None),
        )
        if self.bundle is not None and (flags := [flag for flag, given in asked if given]):
            raise JetExportError(f"inspect {flags[0]}: belongs to --model; a bundle has its own.", "Leave it out.")
        if self.measured is not None and self.tpot_ms is None:
            raise JetExportError("inspect --measured: belongs to --tpot-ms.", "Add --tpot-ms 20, or leave it out.")
        if self.batch is not None and self.tpot_ms is not None:
            raise JetExportError("inspect --batch: --tpot-ms finds the batch itself.", "Leave one of the two out.")
        if self.tpot_ms is not None and (self.context is None or not 0 < self.tpot_ms < math.inf):
            raise JetExportError(
                "inspect --tpot-ms: needs --context and a positive time.", "--context 65536 --tpot-ms 20"
            )


def run_inspect(o: InspectOptions) -> None:
    """Print what the options ask for."""
    if o.tpot_ms is not None:
        print_prediction(o)
    elif o.bundle is not None:
        inspect_bundle(o.bundle, o.batch, o.context)
    else:
        inspect_model(o)


def inspect_model(o: InspectOptions) -> None:
    """Memory of an architecture that is not built yet."""
    assert o.model is not None
    config = load_config(o.model)
    dtypes, weights = model_dtypes(o), weight_bytes(config, torch.bfloat16, o.fp8)
    batch, length = o.batch or 1, o.context or config.max_position_embeddings
    limits = Limits(
        max_batch_size=batch, max_seq_len=length, prefill_chunk=min(o.prefill_chunk or DEFAULT_CHUNK, length)
    )
    memory = engine_memory(config, limits, dtypes, weights)
    out = console()
    out.print(f"{o.model}: {architecture(config)}", markup=False)
    precisions = f"{'FP8' if o.fp8 else 'bf16'} weights, KV cache {dtype_name(dtypes.kv_cache)}, state {o.state_dtype}"
    out.print(f"{batch} sequences x {length} tokens, {precisions}", markup=False)
    out.print(memory_table(memory))


def model_dtypes(o: InspectOptions) -> Dtypes:
    """The dtypes of a bfloat16 engine, by --kv-cache-dtype and --state-dtype."""
    kv_cache = "bfloat16" if o.kv_cache_dtype == "auto" else o.kv_cache_dtype
    return Dtypes.named(model="bfloat16", kv_cache=kv_cache, state=o.state_dtype)


def interval_words(m: Manifest) -> str:
    """How often, and what `build --state-interval auto` would choose here."""
    sm = sm_of_arch(m.target["arch"])
    table = table_interval(m.config, m.dtypes.state, sm, m.limits.max_batch_size)
    every = "every token" if m.state_interval == 1 else f"every {m.state_interval} tokens"
    where = f"SM {sm_name(sm)}" if sm is not None else "no GPU"
    return f"{every} (auto, {where}: {table.tokens}, {table.source})"


def inspect_bundle(bundle: Path, batch: int | None, context: int | None) -> None:
    """A built bundle: its limits, layers and precisions, files, and memory."""
    m = Manifest.load(bundle)
    c = m.config
    batch, context = batch or m.limits.max_batch_size, context or m.limits.max_seq_len
    out = console()
    out.print(f"{m.model['name']}: {architecture(c)}", markup=False)
    built = f"built {m.build.get('date', '?')} in {m.build.get('seconds', '?')} s by: {m.rebuild_command}"
    backend = f"backend {m.backend['name']} (torch {m.backend.get('torch', '?')}) for {m.target['arch']}"
    out.print(f"{backend}; {built}", markup=False)
    out.print(
        f"limits: {m.limits.max_batch_size} sequences x {m.limits.max_seq_len} tokens, chunk {m.limits.prefill_chunk}"
    )
    if m.backend["name"] == "inductor":
        verified = f"up to {m.rollback - 1} drafts a step verified" if m.rollback else "no drafts verified"
        layer = "; multi-token-prediction layer (--speculate mtp)" if m.mtp else ""
        out.print(f"recurrent states written {interval_words(m)}; {verified}{layer}", markup=False)
        if m.fast_accumulation:
            out.print("FP8 products of cuBLAS summed by fast accumulation")
    for warning in m.warnings:
        out.print(f"warning: {warning}", markup=False)
    out.print(layer_precisions(bundle))
    if m.backend["name"] in FLAVORS:
        print_engine(bundle, m, out)
    files = Table(box=None, header_style="bold")
    files.add_column("file")
    files.add_column("bytes", justify="right")
    for name, entry in m.files.items():
        files.add_row(escape(name), human(entry["bytes"]))
    out.print(files)
    limits = Limits(max_batch_size=batch, max_seq_len=context, prefill_chunk=min(m.limits.prefill_chunk, context))
    out.print(f"{batch} sequences x {context} tokens:")
    out.print(memory_table(engine_memory(c, limits, m.dtypes, m.weight_bytes)))


def print_prediction(o: InspectOptions) -> None:
    """The largest batch within a time per token, by measured steps. Raises JetExportError where there are none."""
    from jet_export.bench.predict import Target, find_table, lines, predict
    from jet_export.bench.rows import precision_name, precision_of

    assert o.context is not None and o.tpot_ms is not None
    if o.bundle is not None:
        m = Manifest.load(o.bundle)
        name, precision, chunk = m.model["name"], precision_of(m), m.limits.prefill_chunk
        config, dtypes, weights = m.config, m.dtypes, m.weight_bytes
    else:
        assert o.model is not None
        config, dtypes = load_config(o.model), model_dtypes(o)
        name, precision, chunk = o.model, precision_name(dtypes, fp8=o.fp8), o.prefill_chunk or DEFAULT_CHUNK
        weights = weight_bytes(config, dtypes.model, o.fp8)
    table = find_table(name, precision, o.measured)
    budget = MemoryBudget(config=config, dtypes=dtypes, weights=weights, available=table.available())
    target = Target(tpot_ms=o.tpot_ms, context=o.context, prefill_chunk=chunk)
    found = predict(budget, table, target)
    out = console()
    for line in lines(found, table, target):
        out.print(line, markup=False)
    if found.memory is not None:
        out.print(memory_table(found.memory))


def print_engine(bundle: Path, m: Manifest, out: Console) -> None:
    """Print whether a TensorRT engine was verified, and the layers that it really has, by profile."""
    from jet_export.backends.tensorrt.layers import REPORT, VERIFY_REPORT
    from jet_export.backends.tensorrt.profiles import NAMES, VERIFY_NAMES

    flavor = FLAVORS[m.backend["name"]]
    verified = m.build.get("verified", {})
    how = f"NOT verified: {verified.get('why', 'nobody has said so')}"
    if verified.get("passed"):
        how = f"verified at the build on {verified.get('device', '?')}"
    out.print(f"{flavor.title} {m.backend.get(flavor.backend, '?')}; {how}", markup=False)
    out.print(engine_layers(bundle / REPORT, NAMES))
    if m.rollback:
        out.print(engine_layers(bundle / VERIFY_REPORT, VERIFY_NAMES))


def engine_layers(report: Path, modes: tuple[str, ...]) -> Table:
    """The layers of one engine, with their numbers in each of its profiles."""
    from jet_export.backends.tensorrt.layers import LayerReport, rows

    table = Table(box=None, header_style="bold")
    for column in ("layers of the engine", "node", "precision"):
        table.add_column(column)
    for name in modes:
        table.add_column(name, justify="right")
    for row in rows(LayerReport.load(report), modes):
        table.add_row(row.what, row.name, row.precision, *map(str, row.counts))
    return table


def layer_precisions(bundle: Path) -> Table:
    """Every projection's precision and size, read from the weights file itself; equal layers share a row."""
    from safetensors import safe_open

    from jet_export.utils.tensors import reading_tensors

    groups: dict[tuple[str, str, str], list[int]] = {}
    path = bundle / WEIGHTS
    with reading_tensors(path, "Build the bundle again."), safe_open(path, "pt") as f:
        for name in f.keys():  # noqa: SIM118  not a dict
            t = f.get_slice(name)
            if len(t.get_shape()) != 2 or name == "cos_sin":
                continue
            parts = name.split(".")
            layer = int(parts[1]) if parts[0] == "layers" and parts[1].isdecimal() else -1
            short = ".".join(parts[2:-1] if layer >= 0 else parts[:-1]) or name
            groups.setdefault((short, t.get_dtype(), "x".join(map(str, t.get_shape()))), []).append(layer)
    table = Table(box=None, header_style="bold")
    for column in ("projection", "precision", "shape", "layers"):
        table.add_column(column)
    for (short, dtype, shape), layers in sorted(groups.items(), key=lambda kv: kv[0]):
        table.add_row(escape(short), dtype, shape, ranges(layers) if layers != [-1] else "")
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
