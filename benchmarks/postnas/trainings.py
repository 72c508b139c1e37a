"""What every training of the run took, from its log: a line a stage."""

from __future__ import annotations

import json
import statistics
from itertools import groupby
from pathlib import Path
from typing import Any


def trainings(run: Path) -> list[dict[str, Any]]:
    """By directory and stage: steps, seconds, those of the first step, which may compile, the median tokens/s of the
    other steps (of that process: candidates may train side by side), and the last step's loss. A step that was run
    again, after a stop, counts once."""
    return [stage for log in sorted(run.rglob("log.jsonl")) for stage in _stages(log, log.parent.relative_to(run))]


def _stages(log: Path, name: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    out = []
    for stage, group in groupby((steps[n] for n in sorted(steps)), key=lambda line: line["stage"]):
        first, *others = list(group)
        out.append(
            {
                "training": name.as_posix(),
                "stage": stage,
                "steps": 1 + len(others),
                "seconds": round(sum(s["seconds"] for s in (first, *others)), 1),
                "first_step_seconds": round(first["seconds"], 1),
                "tokens_per_s": round(statistics.median(s["tokens_per_s"] for s in others or [first])),
                "loss": round((others or [first])[-1]["loss"], 4),
            }
        )
    return out
