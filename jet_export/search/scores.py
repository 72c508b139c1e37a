"""The quality of a point, without training it: a proxy, a table, or a callable. Higher is better.

parameters                  their number (the paper's proxy, at equal cache)
paper                       the paper's published figures, for the points of its table
FILE                        .toml, .json or .csv: a score a point
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
from jet_export.search.space import SPACES, LayerCounts, Space
from jet_export.utils.errors import JetExportError

PAPER = SPACES / "paper_scores.toml"


@dataclass(frozen=True, kw_only=True)
class Score:
    name: str  # heads columns and axes
    source: str  # whose figures they are
    of: Callable[[Point, JetNemotronConfig], float | None]  # None for a point without a score
    keys: tuple[str, ...] = ()  # of a table

    def unmatched(self, space: Space, preset: JetNemotronConfig) -> list[str]:
        """Keys of the table that name no point of the space."""
        sizes, groups = {str(d) for d in space.sizes}, set(range(1, space.groups + 1))
        if not isinstance(space.layouts, LayerCounts):
            groups = {1, *(len(used_groups(layout, space)) for layout in space.layouts)}
        named = ((k, k.split("+")) for k in self.keys)
        return [k for k, words in named if not set(words) <= sizes or len(words) not in groups]


def load_score(text: str) -> Score:
    """Raises JetExportError naming what cannot be read."""
    if text == "parameters":
        return Score(
            name="parameters", source="a proxy: more parameters at equal cache (the paper's)", of=count_parameters
        )
    if text == "paper":
        return ScoreTable.read(PAPER).score()
    path, _, name = text.rpartition(":")
    if path and name.isidentifier():
        return Score(name=name, source=f"{text}, the user's", of=checked(import_callable(path, name), text))
    return ScoreTable.read(Path(text)).score()


def count_parameters(point: Point, config: JetNemotronConfig) -> float:
    return float(parameter_count(config))


def checked(
    function: Callable[[JetNemotronConfig, Point], Any], text: str
) -> Callable[[Point, JetNemotronConfig], float | None]:
    """The user's function, whose failures and results are turned into errors that name it."""

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


def import_callable(path: str, name: str) -> Callable[[JetNemotronConfig, Point], Any]:
    try:
        if path.endswith(".py"):
            spec = importlib.util.spec_from_file_location("jet_export_user_scores", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(path)
        function: Callable[[JetNemotronConfig, Point], Any] = getattr(module, name)
        return function
    except (Exception, SystemExit) as e:  # whatever the user's module raises
        raise JetExportError(f"--scores {path}:{name}: cannot be imported ({type(e).__name__}: {e}).") from None


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """A file of scores by the point's sizes ("96x256x12"). See docs/guides/search.md."""

    path: Path
    scores: dict[str, float]
    values: dict[str, Any]  # the whole file

    @classmethod
    def read(cls, path: Path) -> ScoreTable:
        """Raises JetExportError if it cannot be read, or holds no score or an infinite one."""
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
        if not scores:
            raise JetExportError(
                f"--scores {path}: holds no score.", f'Add lines like "96x256x12" = 34.8 to a copy of {path.name}.'
            )
        return cls(path=path, scores=scores, values=values)

    def of(self, point: Point, config: JetNemotronConfig) -> float | None:
        """By the sizes of all groups, or by the one size that they share."""
        sizes = [str(d) for d in point.sizes]
        shared = sizes[0] if len(set(sizes)) == 1 else ""
        return self.scores.get("+".join(sizes), self.scores.get(shared))

    def score(self) -> Score:
        return Score(
            name=str(self.values.get("name", self.path.stem)),
            source=str(self.values.get("source", f"{self.path}, the user's")),
            of=self.of,
            keys=tuple(self.scores),
        )


@dataclass(frozen=True, kw_only=True)
class Published:
    """The paper's figures for one of its points; None if not known here."""

    throughput: float | None
    retrieval: float | None
    math: float | None


def published() -> tuple[dict[JetDims, Published], dict[str, Any]]:
    """The paper's table by sizes, and the whole file (source, GPU, cache, ...)."""
    values = tomllib.loads(PAPER.read_text(encoding="utf-8"))
    rows = {}
    for sizes, row in values["points"].items():
        K, V, H = map(int, sizes.split("x"))
        rows[JetDims(H, K, V)] = Published(
            throughput=row.get("throughput"), retrieval=row.get("retrieval"), math=row.get("math")
        )
    return rows, values
