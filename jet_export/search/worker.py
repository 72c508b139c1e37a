"""Builds a cell or measures cells, in a process of its own: `python -m jet_export.search.worker build|measure`.

A task is a line of JSON on standard input, its answer one on standard output: {} or {"error": ...}. A build's process
takes one task; that of measurements goes on until one fails: what comes after an error on a GPU cannot be trusted.
Measurements go to the database case by case. The process ends with its parent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jet_export.utils.processes import end_with_parent

if TYPE_CHECKING:
    from jet_export.bench.measure import Measurement
    from jet_export.search.database import Entry


def build(task: dict[str, Any]) -> None:
    """A bundle of the cell at task["bundle"], by what `jet-export build` does."""
    from jet_export.build.build import run_build
    from jet_export.build.plan import BuildOptions, make_plan
    from jet_export.search.cells import Cell

    cell, bundle = Cell.from_dict(task["cell"]), Path(task["bundle"])
    bundle.parent.mkdir(parents=True, exist_ok=True)
    config = bundle.with_suffix(".json")
    cell.config.save(config)
    options = BuildOptions(
        model=str(config), backend=task["backend"], device=task["device"], dtype=task["dtype"], fp8=cell.fp8,
        kv_cache_dtype=cell.kv_cache_dtype, state_dtype=cell.state_dtype, max_batch_size=task["max_batch_size"],
        max_seq_len=task["max_seq_len"], prefill_chunk=task["prefill_chunk"], random_weights=True, output=bundle,
        force=True, decode_one=task["decode_one"],
    )  # fmt: skip
    run_build(make_plan(options), ["jet-export", "search"], lambda line: print(line, file=sys.stderr))


def measure(task: dict[str, Any]) -> None:
    """Every case that the database lacks, through the timer of `jet-export bench`; kept one by one."""
    from jet_export.backends.load import load_engine
    from jet_export.bench.measure import Case, measure_engine
    from jet_export.search.cells import Cell
    from jet_export.search.database import Bench, Database

    database, bench, cell = Database(Path(task["database"])), Bench(**task["bench"]), Cell.from_dict(task["cell"])
    gc.collect()  # the cell before
    engine, _ = load_engine(Path(task["bundle"]))
    for batch, context in task["cases"]:
        case = Case(batch, context, min(bench.chunk, context), bench.new_tokens, bench.fill)
        runs = measure_engine(engine, [case] * bench.repeats)
        again = partial(measure_engine, engine, [case])
        before = database.get(bench, cell, batch, context)  # with --remeasure
        database.put(bench, cell, [e.with_repeats(before.get(e.phase)) for e in settled(runs, again)])


def settled(runs: list[Measurement], again: Callable[[], list[Measurement]]) -> list[Entry]:
    """A case's entries. Repeats that do not confirm one another are followed by more, by as many as there are."""
    most = 2 * len(runs)
    entries = [decode_entry(runs), prefill_entry(runs)]
    while len(runs) < most and any(e.confirmed is False for e in entries):
        runs = [*runs, *again()]
        entries = [decode_entry(runs), prefill_entry(runs)]
    return entries


def decode_entry(runs: list[Measurement]) -> Entry:
    """The quickest run: what else a machine does only adds time."""
    m = min(runs, key=lambda r: r.step.median)
    return entry(m, "decode", m.step.median, m.step.p90, [r.step.median for r in runs])


def prefill_entry(runs: list[Measurement]) -> Entry:
    """Of the whole batch's whole context."""
    m = max(runs, key=lambda r: r.prefill_tokens_per_s)
    tokens = m.case.batch * m.case.context
    every = [1e3 * tokens / r.prefill_tokens_per_s for r in runs]
    return entry(m, "prefill", min(every), min(every) * m.prefill_call.p90 / m.prefill_call.median, every)


def entry(m: Measurement, phase: str, median: float, p90: float, every: list[float]) -> Entry:
    from jet_export.search.database import Entry

    details = {"filled_by": m.filled_by, "every_ms": every, "state_bytes": m.state_bytes, "peak_bytes": m.peak_bytes}
    return Entry(m.case.batch, m.case.context, phase, median, p90, details)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    work, parent = {"build": build, "measure": measure}[sys.argv[1]], None
    for line in sys.stdin:
        task = json.loads(line)
        if parent is None:
            parent = task["parent"]
            end_with_parent(parent)
        error = tried(work, task)
        print(json.dumps({"error": error} if error else {}), file=answers, flush=True)
        if error:
            sys.exit(1)


def tried(work: Callable[[dict[str, Any]], None], task: dict[str, Any]) -> str | None:
    """Why it failed."""
    from jet_export.utils.errors import JetExportError

    try:
        work(task)
    except JetExportError as e:
        return str(e).replace("\n", " ")
    except Exception as e:  # out of memory, a compiler's failure: the search goes on without this cell
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"
    return None


if __name__ == "__main__":
    main()
