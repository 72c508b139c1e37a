"""Quality of a point, without training: a proxy, a file, or a callable. Higher is better.

parameters      how many (the paper's proxy, at equal cache)
paper           the published figures of the paper's table, for its points
FILE            .toml, .json or .csv: a score a point
FILE.py:NAME, MODULE:NAME   called with the JetNemotronConfig and the Point, returns a number
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import math
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jet_export.bundle.memory import parameter_count
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.search.points import Point, used_groups
from jet_export.search.space import SPACES, Counts, Space
from jet_export.utils.errors import JetExportError

PAPER = SPACES / "paper_scores.toml"


@dataclass(frozen=True)
class Score:
    """`name` heads columns and axes; `source` says whose figures they are; `of` returns None for an unknown point."""

    name: str
    source: str
    of: Callable[[Point, JetNemotronConfig], float | None]
    keys: tuple[str, ...] = ()  # a table's

    def unmatched(self, space: Space, preset: JetNemotronConfig) -> list[str]:
        """A table's keys that name no point of the space."""
        sizes, groups = {str(d) for d in space.sizes}, set(range(1, space.groups + 1))
        if not isinstance(space.layouts, Counts):
            groups = {1, *(len(used_groups(layout, space)) for layout in space.layouts)}
        named = ((k, k.split("+")) for k in self.keys)
        return [k for k, words in named if not set(words) <= sizes or len(words) not in groups]


def load_score(text: str) -> Score:
    """Raises JetExportError naming what cannot be read."""
    if text == "parameters":
        return Score("parameters", "a proxy: more parameters at equal cache (the paper's)", proxy)
    if text == "paper":
        return from_table(PAPER, *read_table(PAPER))
    path, _, name = text.rpartition(":")
    if path and name.isidentifier():
        return Score(name, f"{text}, the user's", checked(callable_of(path, name), text))
    return from_table(Path(text), *read_table(Path(text)))


def proxy(point: Point, config: JetNemotronConfig) -> float:
    return float(parameter_count(config))


def checked(function: Callable[[JetNemotronConfig, Point], Any], text: str) -> Callable[..., float | None]:
    def score(point: Point, config: JetNemotronConfig) -> float | None:
        try:
            value = function(config, point)
        except (Exception, SystemExit) as e:
            raise JetExportError(f"--scores {text}: raised {type(e).__name__}: {e}.") from None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise JetExportError(f"--scores {text}: returned {value!r}, not a finite number or None.")
        return float(value)

    return score


def callable_of(path: str, name: str) -> Callable[..., Any]:
    try:
        if path.endswith(".py"):
            spec = importlib.util.spec_from_file_location("jet_export_user_scores", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(path)
        return getattr(module, name)
    except (Exception, SystemExit) as e:  # whatever the user's module raises
        raise JetExportError(f"--scores {path}:{name}: cannot be imported ({type(e).__name__}: {e}).") from None


def read_table(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores by the point's sizes ("96x256x12"), and what else the file says. See docs/search.md."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
            values: dict[str, Any] = {"scores": {row["sizes"]: float(row["score"]) for row in rows}}
        else:
            values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        scores = {str(k): float(v) for k, v in values["scores"].items()}
    except FileNotFoundError:
        raise JetExportError(
            f"--scores {path}: no such file.", "It takes parameters, paper, a file, or FILE.py:FUNCTION."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as e:
        raise JetExportError(
            f"--scores {path}: not a table of scores ({type(e).__name__}: {e}).",
            'Write [scores] with lines like "96x256x12" = 34.8, or CSV with the columns sizes and score.',
        ) from None
    bad = next((k for k, v in scores.items() if not math.isfinite(v)), None)
    if bad is not None:
        raise JetExportError(f"--scores {path}: the score of {bad} is {scores[bad]}.", "Leave the line out.")
    return scores, values


def from_table(path: Path, scores: dict[str, float], values: dict[str, Any]) -> Score:
    if not scores:
        raise JetExportError(
            f"--scores {path}: holds no score.", f'Add lines like "96x256x12" = 34.8 to a copy of {path.name}.'
        )

    def of(point: Point, config: JetNemotronConfig) -> float | None:
        return scores.get("+".join(str(d) for d in point.sizes), scores.get(shared(point)))

    source = str(values.get("source", f"{path}, the user's"))
    return Score(str(values.get("name", path.stem)), source, of, tuple(scores))


def shared(point: Point) -> str:
    """The sizes that all groups have; nothing a table names where they differ."""
    return str(point.sizes[0]) if len(set(point.sizes)) == 1 else ""


@dataclass(frozen=True)
class Published:
    """What the paper says of one of its points; None where it is not known here."""

    throughput: float | None
    retrieval: float | None
    math: float | None


def published() -> tuple[dict[JetDims, Published], dict[str, Any]]:
    """The paper's table by sizes, and the file's remarks (source, setting, cache)."""
    values = tomllib.loads(PAPER.read_text(encoding="utf-8"))
    rows = {}
    for sizes, row in values["points"].items():
        K, V, H = map(int, sizes.split("x"))
        rows[JetDims(H, K, V)] = Published(*(row.get(k) for k in ("throughput", "retrieval", "math")))
    return rows, values
