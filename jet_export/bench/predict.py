"""Which batch fits a time per token: predicted from a measured table (a bench.json), with the prediction's own error.

    step = overhead + bytes / bandwidth + sequences * each,     bytes as roofline.step_bytes counts them

is fitted to the table's decode steps by least squares of the relative error, no term negative; one table for one bundle
on one device. `each` is the arithmetic that grows with the batch; fewer than MIN_BATCHES batches cannot tell it from
the overhead. Steps of one sequence, which another package decodes, are fitted apart where there are enough others. The
error is that of each row predicted from all the others. Memory is memory.py's; nothing is run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from jet_export.bench.roofline import step_bytes
from jet_export.bench.rows import Row, row_from_dict
from jet_export.bundle.dtypes import torch_dtype
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import USABLE, Memory, available_memory, engine_memory, largest_batch
from jet_export.model.cache import state_specs
from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError

MIN_ROWS = 4  # to fit three numbers and be wrong about a fourth
MIN_BATCHES = 3  # different ones


@dataclass(frozen=True)
class Fit:
    """Seconds a step, seconds a byte, seconds a sequence; none negative."""

    overhead: float
    byte: float
    each: float

    def seconds(self, nbytes: float, batch: int) -> float:
        return self.overhead + self.byte * nbytes + self.each * batch


@dataclass(frozen=True)
class Table:
    """Measured steps of one bundle on one device; `bundle` is its manifest's hash."""

    files: tuple[Path, ...]
    device: str
    date: str
    model: str
    precision: str
    rows: tuple[Row, ...]
    gpu_bytes: int = 0  # of the device's memory; 0: a CPU
    bundle: str = ""

    def available(self) -> int:
        """Bytes that batches may take there: of the GPU that was measured, or of this host."""
        return int(USABLE * self.gpu_bytes) if self.gpu_bytes else available_memory(torch.device("cpu"))

    @property
    def enough(self) -> bool:
        return len(self.rows) >= MIN_ROWS and len({r.batch for r in self.rows}) >= MIN_BATCHES

    @property
    def named(self) -> str:
        names = ", ".join(f"{f.parent.name}/{f.name}" for f in self.files)
        return f"{self.model} {self.precision} on {self.device}, {self.date}, {names}"


@dataclass(frozen=True)
class Alone:
    """Steps of one sequence, which a package of its own decodes on a GPU: Fit's seconds a byte, another overhead."""

    overhead: float
    byte: float
    errors: tuple[float, ...]  # of each step predicted from the others; empty where there is one

    def seconds(self, nbytes: float) -> float:
        return self.overhead + self.byte * nbytes


@dataclass(frozen=True)
class Prediction:
    batch: int  # the largest that meets the time and fits; 0: not one sequence does
    seconds: float  # its step
    bound: str  # "time" or "memory": what keeps it from being larger
    memory: Memory | None
    fit: Fit
    errors: tuple[float, ...]  # relative, of each step that was fitted, predicted from the others
    alone: Alone | None  # where steps of one sequence are fitted apart

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.seconds if self.batch else 0.0


def read_tables(file: Path) -> list[Table]:
    """Raises JetExportError where the file is no bench.json."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        e = values["environment"]
        device = e["gpu"] if e["gpu"] != "none" else e.get("cpu", "a CPU")
        memory = int(e["gpu_bytes"]) if e["gpu"] != "none" else 0
        return [
            Table((file,), device, e["date"], b["model"], rows[0].precision, tuple(rows), memory, b["manifest_sha256"])
            for b in values["bundles"]
            if (rows := [row_from_dict(r) for r in b["rows"]])
        ]
    except FileNotFoundError:
        raise JetExportError(f"--measured {file}: no such file.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise JetExportError(f"--measured {file}: not a bench.json.", "Make one with jet-export bench.") from None


def committed_tables() -> list[Path]:
    """benchmarks/results/**/bench*.json of the repository, where the package is run from one."""
    return sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("bench*.json"))


def find_table(model: str, precision: str, measured: Path | None) -> Table:
    """The table of this model and precision: from `measured`, or the committed files of the bundle and device with the
    most steps, and batches enough. Raises JetExportError, saying how to make one, where there is none."""
    found: dict[tuple[str, str], Table] = {}
    for file in [measured] if measured else committed_tables():
        for table in read_tables(file):
            if (table.model, table.precision) == (model, precision):
                key = (table.device, table.bundle)
                found[key] = joined(found[key], table) if key in found else table
    best = max((t for t in found.values() if t.enough), key=lambda t: len(t.rows), default=None)
    if best is not None:
        return best
    where = str(measured) if measured else "benchmarks/results"
    raise JetExportError(
        f"--tpot-ms: {where} has no measured table of {model} {precision} (at least {MIN_ROWS} decode steps, "
        f"of at least {MIN_BATCHES} batches).",
        "Make one where it will run: jet-export bench BUNDLE --contexts 4096,65536 --batch 1,8,64 --output DIR, "
        "then add --measured DIR/bench.json",
    )


def joined(a: Table, b: Table) -> Table:
    """Both tables of one bundle on one device; `date` is the later."""
    return replace(a, files=a.files + b.files, rows=a.rows + b.rows, date=max(a.date, b.date))


def fit_steps(points: Sequence[tuple[float, int, float]]) -> Fit:
    """(bytes, batch, seconds) -> the terms, none negative, that leave the least relative error: of the fits by least
    squares with some terms left out, the best that is not negative."""
    x = np.array([[1.0, nbytes, batch] for nbytes, batch, _ in points])
    y = np.array([seconds for *_, seconds in points])
    scale = x.max(axis=0)
    weighted = x / scale / y[:, None]
    best, least = np.zeros(3), float("inf")
    for kept in ((0, 1, 2), (1, 2), (0, 1), (0, 2), (1,), (2,), (0,)):
        part, *_ = np.linalg.lstsq(weighted[:, kept], np.ones(len(y)), rcond=None)
        left = float(np.square(weighted[:, kept] @ part - 1).sum())
        if part.min() >= 0 and left < least * (1 - 1e-9):
            best, least = np.zeros(3), left
            best[list(kept)] = part
    return Fit(*(float(v) for v in best / scale))


def left_out_errors(points: Sequence[tuple[float, int, float]]) -> tuple[float, ...]:
    """Relative error of each step, predicted from the others."""
    out = []
    for i, (nbytes, batch, seconds) in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        out.append(abs(fit_steps(others).seconds(nbytes, batch) - seconds) / seconds)
    return tuple(out)


def fit_alone(points: Sequence[tuple[float, int, float]], byte: float) -> Alone | None:
    """Of the steps of one sequence; None where there is none."""
    left = [(seconds - byte * nbytes, seconds) for nbytes, batch, seconds in points if batch == 1]
    if not left:
        return None
    total = sum(overhead for overhead, _ in left)
    errors = [abs((total - o) / (len(left) - 1) - o) / seconds for o, seconds in left] if len(left) > 1 else []
    return Alone(total / len(left), byte, tuple(errors))


def predict(
    c: JetNemotronConfig, dtypes: tuple[str, str, str], weights: int, table: Table, context: int, tpot_ms: float,
    available: int, chunk: int,
) -> Prediction:  # fmt: skip
    """dtypes: of the model, the KV cache and the state."""
    points = [(float(r.step_bytes["total"]), r.batch, r.ms_per_token * 1e-3) for r in table.rows]
    several = [p for p in points if p[1] > 1]
    if len(several) < MIN_ROWS:
        several = points
    fit = fit_steps(several)
    alone = fit_alone(points, fit.byte) if several is not points else None
    read = table.rows[0].step_bytes["weights"]
    dtype, kv, state = (torch_dtype(d) for d in dtypes)
    specs = state_specs(c, dtype, kv, state)

    def seconds(batch: int) -> float:
        total = step_bytes(c, specs, read, batch, context).total
        return alone.seconds(total) if batch == 1 and alone else fit.seconds(total, batch)

    most = largest_batch(c, context, min(chunk, context), dtype, kv, state, weights, available)
    each = seconds(3) - seconds(2)
    in_time = int(seconds(1) <= tpot_ms * 1e-3)
    if seconds(2) <= tpot_ms * 1e-3:
        in_time = int(min((tpot_ms * 1e-3 - seconds(2)) / each + 2 + 1e-9, most + 1)) if each > 0 else most + 1
    batch = min(in_time, most)
    limits = Limits(max_batch_size=max(batch, 1), max_seq_len=context, prefill_chunk=min(chunk, context))
    memory = engine_memory(c, limits, dtype, kv, state, weights) if batch else None
    bound = "time" if in_time <= most else "memory"
    return Prediction(batch, seconds(max(batch, 1)), bound, memory, fit, left_out_errors(several), alone)


def lines(p: Prediction, table: Table, context: int, tpot_ms: float) -> list[str]:
    """What inspect prints."""
    out = [f"from {len(p.errors)} measured decode steps: {table.named}",
           f"step = {1e3 * p.fit.overhead:.3g} ms + {1e12 * p.fit.byte:.3g} ms/GB + {1e3 * p.fit.each:.3g} ms/seq.; "
           f"each step predicted from the others is off by {_off(p.errors)}"]  # fmt: skip
    if p.batch <= 1 and p.alone:
        steps, errors = max(len(p.alone.errors), 1), p.alone.errors
        out.append(f"step of one sequence, fitted apart to {steps} measured = {1e3 * p.alone.overhead:.3g} ms + "
                   f"{1e12 * p.alone.byte:.3g} ms/GB; "
                   + (f"each predicted from the others is off by {_off(errors)}" if errors
                      else "there is no other to say how far it is off"))  # fmt: skip
    seen = [r.context for r in table.rows]
    if not min(seen) <= context <= max(seen):
        out.append(f"context {context} lies outside the measured ones, {min(seen)} to {max(seen)}: extrapolated")
    if not p.batch:
        why = "one sequence takes longer" if p.bound == "time" else "not one sequence fits the memory"
        return [*out, f"{tpot_ms:g} ms a token at context {context}: not reached: {why} ({1e3 * p.seconds:.3g} ms)"]
    biggest = max(r.batch for r in table.rows)
    if p.batch > biggest:
        out.append(f"batch {p.batch} is beyond the largest measured, {biggest}: extrapolated")
    return [*out, f"largest batch within {tpot_ms:g} ms a token at context {context}: {p.batch} (bound by {p.bound}); "
            f"predicted {p.tokens_per_s:,.0f} tokens/s, {1e3 * p.seconds:.3g} ms a token"]  # fmt: skip


def _off(errors: Sequence[float]) -> str:
    return f"{statistics.median(errors):.1%} (median), {max(errors):.1%} (worst)"
