"""The largest batch within a time per token, predicted from measured steps (a bench.json), with the prediction's error.

    step = overhead + bytes / bandwidth + sequences * each,     bytes as roofline.step_bytes counts them

is fitted to the decode steps of one bundle on one device by least squares of the relative error, with no negative term.
`each` is the arithmetic that grows with the batch; it takes MIN_BATCHES batches to tell it from the overhead. Steps of
one sequence, which run in a package of their own, are fitted separately where there are enough others. The error is
that of each row predicted from all the others. Memory is estimated by bundle/memory.py; nothing is run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from jet_export.bench.prompt_calls import PromptCall
from jet_export.bench.roofline import spaced_bytes, step_bytes
from jet_export.bench.rows import Row
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import USABLE, Memory, MemoryBudget, available_memory
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import DATA

MIN_ROWS = 4  # three numbers are fitted, and one row is left to show an error
MIN_BATCHES = 3  # different ones


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The terms of a step's time; none negative."""

    overhead: float  # seconds
    byte: float  # seconds a byte
    each: float  # seconds a sequence

    def seconds(self, nbytes: float, batch: int) -> float:
        return self.overhead + self.byte * nbytes + self.each * batch


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """Measured steps of one bundle on one device."""

    files: tuple[Path, ...]
    device: str
    date: str
    model: str
    precision: str
    rows: tuple[Row, ...]
    gpu_bytes: int = 0  # the device's memory; 0: a CPU
    bundle: str = ""  # the manifest's hash
    prompt_calls: tuple[PromptCall, ...] = ()  # none in older tables

    def available(self) -> int:
        """Bytes that a batch may take: on the GPU that was measured, or on this host."""
        return int(USABLE * self.gpu_bytes) if self.gpu_bytes else available_memory(torch.device("cpu"))

    @property
    def enough(self) -> bool:
        return len(self.rows) >= MIN_ROWS and len({r.batch for r in self.rows}) >= MIN_BATCHES

    @property
    def named(self) -> str:
        names = ", ".join(f"{f.parent.name}/{f.name}" for f in self.files)
        return f"{self.model} {self.precision} on {self.device}, {self.date}, {names}"


@dataclass(frozen=True, kw_only=True)
class Alone:
    """Steps of one sequence, which a package of its own decodes on a GPU: Fit's seconds a byte, another overhead."""

    overhead: float
    byte: float
    errors: tuple[float, ...]  # of each step predicted from the others; empty where there is only one

    def seconds(self, nbytes: float) -> float:
        return self.overhead + self.byte * nbytes


@dataclass(frozen=True, kw_only=True)
class Target:
    """The time to stay within."""

    tpot_ms: float  # a token
    context: int  # tokens that each sequence holds
    prefill_chunk: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The largest batch, and how it was found."""

    batch: int  # 0: not even one sequence meets the time and fits
    seconds: float  # its step
    bound: str  # "time" or "memory": what limits it
    memory: Memory | None
    fit: Fit
    errors: tuple[float, ...]  # relative, of each fitted step predicted from the others
    alone: Alone | None  # where steps of one sequence are fitted separately

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.seconds if self.batch else 0.0


def read_tables(file: Path) -> list[StepTable]:
    """The tables of a bench.json. Raises JetExportError where the file is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        e = values["environment"]
        device = e["gpu"] if e["gpu"] != "none" else e.get("cpu", "a CPU")
        memory = int(e["gpu_bytes"]) if e["gpu"] != "none" else 0
        return [
            StepTable(
                files=(file,),
                device=device,
                date=e["date"],
                model=b["model"],
                precision=rows[0].precision,
                rows=tuple(rows),
                gpu_bytes=memory,
                bundle=b["manifest_sha256"],
                prompt_calls=tuple(PromptCall(**c) for c in b.get("prompt_calls", ())),
            )
            for b in values["bundles"]
            if (rows := [Row(**r) for r in b["rows"]])
        ]
    except FileNotFoundError:
        raise JetExportError(f"--measured {file}: no such file.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise JetExportError(f"--measured {file}: not a bench.json.", "Make one with jet-export bench.") from None


def committed_tables() -> list[Path]:
    """Those that come with the package."""
    return sorted((DATA / "measured").rglob("*.json"))


def find_table(model: str, precision: str, measured: Path | None, asking: str = "--tpot-ms") -> StepTable:
    """The table of this model and precision in `measured`, or, of the committed ones with enough batches, that with the
    most steps. Raises JetExportError, saying how to make one and what is `asking`, where there is none."""
    found: dict[tuple[str, str], StepTable] = {}
    for file in [measured] if measured else committed_tables():
        for table in read_tables(file):
            if (table.model, table.precision) == (model, precision):
                key = (table.device, table.bundle)
                found[key] = joined(found[key], table) if key in found else table
    best = max((t for t in found.values() if t.enough), key=lambda t: len(t.rows), default=None)
    if best is not None:
        return best
    where = str(measured) if measured else "this package"
    raise JetExportError(
        f"{asking}: {where} has no measured table of {model} {precision} (at least {MIN_ROWS} decode steps, "
        f"of at least {MIN_BATCHES} batches).",
        "Make one where it will run: jet-export bench BUNDLE --contexts 4096,65536 --batch 1,8,64 --output DIR, "
        "then add --measured DIR/bench.json",
    )


def joined(a: StepTable, b: StepTable) -> StepTable:
    """Two tables of one bundle on one device as one, with the later date."""
    calls = a.prompt_calls + b.prompt_calls
    return replace(a, files=a.files + b.files, rows=a.rows + b.rows, prompt_calls=calls, date=max(a.date, b.date))


def fit_steps(points: Sequence[tuple[float, int, float]]) -> Fit:
    """(bytes, batch, seconds) -> the non-negative terms with the least relative error: of the least-squares fits with
    some terms left out, the best one without negative terms."""
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
    overhead, byte, each = (float(v) for v in best / scale)
    return Fit(overhead=overhead, byte=byte, each=each)


def left_out_errors(points: Sequence[tuple[float, int, float]]) -> tuple[float, ...]:
    """Relative error of each step, predicted from the others."""
    out = []
    for i, (nbytes, batch, seconds) in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        out.append(abs(fit_steps(others).seconds(nbytes, batch) - seconds) / seconds)
    return tuple(out)


def fit_alone(points: Sequence[tuple[float, int, float]], byte: float) -> Alone | None:
    """The fit of the steps of one sequence; None where there are none."""
    left = [(seconds - byte * nbytes, seconds) for nbytes, batch, seconds in points if batch == 1]
    if not left:
        return None
    total = sum(overhead for overhead, _ in left)
    errors = [abs((total - o) / (len(left) - 1) - o) / seconds for o, seconds in left] if len(left) > 1 else []
    return Alone(overhead=total / len(left), byte=byte, errors=tuple(errors))


def predict(budget: MemoryBudget, table: StepTable, target: Target) -> Prediction:
    """The largest batch of the budget's model that meets the target, by the table's measurements of that model."""
    points = [(float(r.moved), r.batch, r.step_seconds) for r in table.rows]
    several = [p for p in points if p[1] > 1]
    if len(several) < MIN_ROWS:
        several = points
    fit = fit_steps(several)
    alone = fit_alone(points, fit.byte) if several is not points else None
    read = table.rows[0].step_bytes["weights"]
    specs = budget.dtypes.specs(budget.config)

    def seconds(batch: int) -> float:
        step = step_bytes(budget.config, specs, read, batch, target.context)
        total = spaced_bytes(step, specs, batch, budget.dtypes.state_interval).total
        return alone.seconds(total) if batch == 1 and alone else fit.seconds(total, batch)

    chunk = min(target.prefill_chunk, target.context)
    most = budget.largest_batch(max_seq_len=target.context, prefill_chunk=chunk)
    allowed, each = target.tpot_ms * 1e-3, seconds(3) - seconds(2)
    in_time = int(seconds(1) <= allowed)
    if seconds(2) <= allowed:
        in_time = int(min((allowed - seconds(2)) / each + 2 + 1e-9, most + 1)) if each > 0 else most + 1
    batch = min(in_time, most)
    limits = Limits(max_batch_size=max(batch, 1), max_seq_len=target.context, prefill_chunk=chunk)
    return Prediction(
        batch=batch,
        seconds=seconds(max(batch, 1)),
        bound="time" if in_time <= most else "memory",
        memory=budget.memory(limits) if batch else None,
        fit=fit,
        errors=left_out_errors(several),
        alone=alone,
    )


def lines(p: Prediction, table: StepTable, target: Target) -> list[str]:
    """What inspect prints."""
    context, tpot_ms = target.context, target.tpot_ms
    out = [
        f"from {len(p.errors)} measured decode steps: {table.named}",
        f"step = {1e3 * p.fit.overhead:.3g} ms + {1e12 * p.fit.byte:.3g} ms/GB + {1e3 * p.fit.each:.3g} ms/seq.; "
        f"each step predicted from the others is off by {_off(p.errors)}",
    ]
    if p.batch <= 1 and p.alone:
        out.append(_alone_line(p.alone))
    seen = [r.context for r in table.rows]
    if not min(seen) <= context <= max(seen):
        out.append(f"context {context} lies outside the measured ones, {min(seen)} to {max(seen)}: extrapolated")
    if not p.batch:
        why = "one sequence takes longer" if p.bound == "time" else "not one sequence fits the memory"
        return [*out, f"{tpot_ms:g} ms a token at context {context}: not reached: {why} ({1e3 * p.seconds:.3g} ms)"]
    biggest = max(r.batch for r in table.rows)
    if p.batch > biggest:
        out.append(f"batch {p.batch} is beyond the largest measured, {biggest}: extrapolated")
    return [
        *out,
        f"largest batch within {tpot_ms:g} ms a token at context {context}: {p.batch} (bound by {p.bound}); "
        f"predicted {p.tokens_per_s:,.0f} tokens/s, {1e3 * p.seconds:.3g} ms a token",
    ]


def _alone_line(alone: Alone) -> str:
    error = (
        f"each predicted from the others is off by {_off(alone.errors)}"
        if alone.errors
        else "with no other step, its error is not known"
    )
    return (
        f"step of one sequence, fitted apart to {max(len(alone.errors), 1)} measured = "
        f"{1e3 * alone.overhead:.3g} ms + {1e12 * alone.byte:.3g} ms/GB; {error}"
    )


def _off(errors: Sequence[float]) -> str:
    return f"{statistics.median(errors):.1%} (median), {max(errors):.1%} (worst)"
