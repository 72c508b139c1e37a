"""The report of `jet-export try` while it grows: every step with its seconds and its outcome, written after each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jet_export.tryout.page import page
from jet_export.utils.environment import environment
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically

Emit = Callable[[str], None]
T = TypeVar("T")
REPORT, PAGE = "try.json", "try.md"
OK, FAILED, NOT_RUN = "ok", "failed", "not run"


class Report:
    """A step that fails is recorded, and those that do not need it go on. `values` is the content of try.json."""

    def __init__(self, output: Path, model: str, command: list[str], emit: Emit) -> None:
        self.output, self.emit = output, emit
        self.values: dict[str, Any] = {
            "model": model,
            "command": " ".join(command),
            "environment": environment(),
            "steps": [],
            "precisions": {},
            "failures": [],
        }

    def save(self) -> None:
        steps = self.values["steps"]
        self.values["failures"] = [f"{s['step']}: {s['why']}" for s in steps if s["status"] == FAILED]
        write_atomically(self.output / REPORT, json.dumps(self.values, indent=1) + "\n")
        write_atomically(self.output / PAGE, page(self.values))

    def not_run(self, step: str, why: str) -> None:
        self.emit(f"== {step}: not run: {why}")
        self.values["steps"].append({"step": step, "status": NOT_RUN, "why": why})
        self.save()

    def step(self, name: str, work: Callable[[], T]) -> T | None:
        """The result of `work`; None where it failed, and the report says why."""
        self.emit(f"== {name}")
        start, why, result = time.monotonic(), "", None
        try:
            result = work()
        except (JetExportError, RuntimeError, OSError) as e:  # a GPU's errors are RuntimeErrors
            why = str(e) if isinstance(e, JetExportError) else f"{type(e).__name__}: {e}"
            self.emit(f"   failed: {why}")
        entry = {"step": name, "status": FAILED if why else OK, "seconds": round(time.monotonic() - start, 1)}
        self.values["steps"].append({**entry, **({"why": why} if why else {})})
        self.save()
        return result
