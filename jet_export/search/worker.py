"""Builds a cell or measures cells, in a process of its own: `python -m jet_export.search.worker WORK`.

A task is a line of JSON on standard input, the answer a line on standard output: {} or {"error": ...}. `build` takes
one task. `measure` takes tasks until one fails, since what is measured after an error on a GPU cannot be trusted; it
writes to the database case by case. `describe` answers {"host": ...}. A task may say which machine it is for, and is
not done on another: {"error": ..., "other_machine": true}. The process ends with its parent.
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

from jet_export.utils.errors import JetExportError
from jet_export.utils.processes import end_with_parent

if TYPE_CHECKING:
    from jet_export.bench.measure import Measurement
    from jet_export.search.database import Entry


class OtherMachine(JetExportError):
    """Not the machine, or not the versions, that a task is for."""


def describe(task: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from jet_export.bundle.target import target_device
    from jet_export.search.machine import Host

    return {"host": asdict(Host.of(target_device(task["device"])))}


def check_machine(task: dict[str, Any]) -> None:
    """Raises OtherMachine where task["expects"], parts of describe_machine, are not so here."""
    if not task.get("expects"):
        return
    from jet_export.bundle.target import target_device
    from jet_export.search.machine import describe_machine

    here = describe_machine(target_device(task["device"]))
    differ = [f"{k} {here.get(k)} instead of {v}" for k, v in task["expects"].items() if here.get(k) != v]
    if differ:
        raise OtherMachine(f"another machine than the search's: {', '.join(differ)}.")


def build(task: dict[str, Any]) -> None:
    """Build the cell at task["bundle"], as `jet-export build` does."""
    from jet_export.build.build import run_build
    from jet_export.build.plan import BuildOptions, make_plan
    from jet_export.search.cells import Cell

    check_machine(task)
    cell, bundle = Cell.from_dict(task["cell"]), Path(task["bundle"])
    bundle.parent.mkdir(parents=True, exist_ok=True)
    config = bundle.with_suffix(".json")
    cell.config.save(config)
    options = BuildOptions(
        model=str(config),
        backend=task["backend"],
        device=task["device"],
        dtype=task["dtype"],
        fp8=cell.fp8,
        kv_cache_dtype=cell.kv_cache_dtype,
        state_dtype=cell.state_dtype,
        max_batch_size=task["max_batch_size"],
        max_seq_len=task["max_seq_len"],
        prefill_chunk=task["prefill_chunk"],
        random_weights=True,
        output=bundle,
        force=True,
        decode_one=task["decode_one"],
    )
    run_build(make_plan(options), ["jet-export", "search"], lambda line: print(line, file=sys.stderr))


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Time the cell at every case, as `jet-export bench` does, and write each to the database at once. Where the
    database is another machine's, task["database"] is None, and the answer has the entries."""
    from dataclasses import asdict

    from jet_export.backends.load import load_engine
    from jet_export.bench.measure import Case, measure_engine
    from jet_export.search.cells import Cell
    from jet_export.search.database import Database, MeasurementSetup

    check_machine(task)
    cell, setup = Cell.from_dict(task["cell"]), MeasurementSetup(**task["setup"])
    database = Database(Path(task["database"])) if task["database"] else None
    gc.collect()  # the previous cell's engine
    engine, _ = load_engine(Path(task["bundle"]))
    answer = []
    for batch, context in task["cases"]:
        case = Case(
            batch=batch,
            context=context,
            chunk=min(setup.chunk, context),
            new_tokens=setup.new_tokens,
            fill=setup.fill,
        )
        runs = measure_engine(engine, [case] * setup.repeats)
        entries = repeat_until_confirmed(runs, partial(measure_engine, engine, [case]))
        if database is None:
            answer += [asdict(e) for e in entries]
        else:
            database.merge(setup, cell, entries)
    return {"entries": answer} if database is None else {}


def repeat_until_confirmed(runs: list[Measurement], again: Callable[[], list[Measurement]]) -> list[Entry]:
    """A case's entries, measured up to twice as often where the two fastest repeats of a phase disagree."""
    most = 2 * len(runs)
    entries = [decode_entry(runs), prefill_entry(runs)]
    while len(runs) < most and any(e.confirmed is False for e in entries):
        runs = [*runs, *again()]
        entries = [decode_entry(runs), prefill_entry(runs)]
    return entries


def decode_entry(runs: list[Measurement]) -> Entry:
    """The fastest run: other load on the machine only adds time."""
    fastest = min(runs, key=lambda r: r.step.median)
    every_ms = [r.step.median for r in runs]
    return entry(fastest, "decode", fastest.step.p90, every_ms)


def prefill_entry(runs: list[Measurement]) -> Entry:
    """The fastest run's prefill of the whole context of the whole batch."""
    fastest = max(runs, key=lambda r: r.prefill_tokens_per_s)
    tokens = fastest.case.batch * fastest.case.context
    every_ms = [1e3 * tokens / r.prefill_tokens_per_s for r in runs]
    p90 = min(every_ms) * fastest.prefill_call.p90 / fastest.prefill_call.median
    return entry(fastest, "prefill", p90, every_ms)


def entry(m: Measurement, phase: str, p90_ms: float, every_ms: list[float]) -> Entry:
    from jet_export.search.database import Entry

    return Entry(
        batch=m.case.batch,
        context=m.case.context,
        phase=phase,
        median_ms=min(every_ms),
        p90_ms=p90_ms,
        details={
            "filled_by": m.filled_by,
            "every_ms": every_ms,
            "state_bytes": m.state_bytes,
            "peak_bytes": m.peak_bytes,
        },
    )


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what libraries print is not taken for an answer
    work = {"build": build, "measure": measure, "describe": describe}[sys.argv[1]]
    parent = None
    for line in sys.stdin:
        task = json.loads(line)
        if parent is None:
            parent = task["parent"]
            end_with_parent(parent)
        answer = answer_of(work, task)
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            sys.exit(1)


def answer_of(work: Callable[[dict[str, Any]], dict[str, Any] | None], task: dict[str, Any]) -> dict[str, Any]:
    """Do the task; what it answers, or why it failed."""
    try:
        return work(task) or {}
    except OtherMachine as e:
        return {"error": str(e), "other_machine": True}
    except JetExportError as e:
        return {"error": str(e).replace("\n", " ")}
    except Exception as e:  # out of memory, a compiler's failure: the search goes on without this cell
        return {"error": f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"}


if __name__ == "__main__":
    main()
