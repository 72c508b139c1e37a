"""Reads a recipe from TOML into its dataclasses: a mistake is one message: file, key, what is allowed."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jet_export.training import recipe as r
from jet_export.training.recipe import Recipe
from jet_export.utils.errors import JetExportError

T = TypeVar("T")
SEE = "docs/guides/retrofit.md lists the keys."
CHOICES: dict[str, tuple[str, ...]] = {
    "student.init": r.WARM_STARTS,
    "data.source.format": r.FORMATS,
    "stage.loss": r.LOSSES,
    "stage.train": (*r.PARTS, "all"),
    "stage.lr_scale": r.PARTS,
    "stage.schedule": r.SCHEDULES,
    "run.dtype": r.DTYPES,
}
LEAST: dict[str, float] = {  # other numbers: 0
    "data.sequence_length": 2,
    "data.batch": 1,
    "student.conv_size": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "run.micro_batch": 1,
    "run.log_every": 1,
}
MOST: dict[str, float] = {"stage.warmup": 1, "stage.decay": 1, "stage.min_lr": 1, "optimizer.betas": 1}
POSITIVE = ("data.source.weight", "stage.lr", "stage.temperature", "optimizer.eps")


def read_recipe(path: Path) -> Recipe:
    """Raises JetExportError naming the file, the key and the values it takes."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JetExportError(f"--recipe {path}: no such file.", SEE) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as e:
        raise JetExportError(f"--recipe {path}: not valid TOML: {e}.", SEE) from None
    return recipe_of(values, f"--recipe {path}")


def recipe_of(values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of these values, as tomllib gives them; not yet checked as a whole (`check_recipe`)."""
    return _Reader(where).table(Recipe, values, "")


class _Reader:
    def __init__(self, where: str) -> None:
        self.where = where

    def bad(self, key: str, what: str, todo: str = SEE) -> JetExportError:
        return JetExportError(f"{self.where}: {key} {what}.", todo)

    def table(self, cls: type[T], values: Any, key: str) -> T:
        if not isinstance(values, Mapping):
            raise self.bad(key, f"is {values!r}, not a table")
        types = typing.get_type_hints(cls)
        for name in values:
            if name not in types:
                raise self.bad(join(key, name), "is not known", f"Known: {', '.join(types)}.")
        return cls(**{name: self.value(types[name], value, join(key, name)) for name, value in values.items()})

    def value(self, kind: Any, value: Any, key: str) -> Any:
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return self.table(kind, value, key)
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            if dataclasses.is_dataclass(item) and not isinstance(value, list):
                raise self.bad(key, f"is {value!r}, not a list of tables", f"Write [[{key}]].")
            listed = value if isinstance(value, list) else [value]
            return tuple(self.value(item, v, key) for v in listed)
        if typing.get_origin(kind) is dict:
            if not isinstance(value, Mapping):
                raise self.bad(key, f"is {value!r}, not a table")
            for name in value:
                self.choice(name, key)
            return {name: self.value(float, v, f"{key}.{name}") for name, v in value.items()}
        if kind is bool:
            if not isinstance(value, bool):
                raise self.bad(key, f"is {value!r}", "It takes true or false.")
            return value
        if kind is str:
            if not isinstance(value, str):
                raise self.bad(key, f"is {value!r}", "It takes a string.")
            return self.choice(value, key)
        return self.number(kind, value, key)

    def choice(self, value: str, key: str) -> str:
        if key in CHOICES and value not in CHOICES[key]:
            raise self.bad(key, f"is {value!r}", f"It takes {', '.join(CHOICES[key])}.")
        return value

    def number(self, kind: type[Any], value: Any, key: str) -> Any:
        low, high = LEAST.get(key, 0), MOST.get(key, 1e18)
        takes = f"{'a whole number' if kind is int else 'a number'} of at least {low:g}"
        takes = f"a number above {low:g}" if key in POSITIVE else takes
        takes += f", at most {high:g}" if key in MOST else ""
        real = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
        if isinstance(value, bool) or not real or not low <= value <= high or (key in POSITIVE and value == low):
            raise self.bad(key, f"is {value!r}", f"It takes {takes}.")
        return kind(value)


def join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def check_recipe(recipe: Recipe, where: str = "recipe") -> Recipe:
    """The recipe with its defaults filled in. Raises JetExportError for what is missing, or does not go together."""

    def bad(what: str, todo: str = SEE) -> JetExportError:
        return JetExportError(f"{where}: {what}.", todo)

    data = recipe.data
    if not recipe.teacher:
        raise bad("no teacher", "Pass --teacher DIR, or set teacher in the recipe.")
    if not recipe.student.layers:
        raise bad("no student.layers", "Pass --student-layers jajs..., a preset or a config.json.")
    if not data.source:
        raise bad("no data.source", "Pass --data FILE, or write [[data.source]] with path or hf.")
    shards = data.shards or max(n for n in range(1, min(8, data.batch) + 1) if data.batch % n == 0)
    if data.batch % shards:
        raise bad(f"data.batch {data.batch} is not a multiple of data.shards {shards}", "Change one of them.")
    sources = tuple(dataclasses.replace(s, name=s.name or s.path or s.hf) for s in data.source)
    names = [s.name for s in sources]
    for s in sources:
        if bool(s.path) == bool(s.hf):
            raise bad("a data.source has both path and hf, or neither", "Give it one of them.")
        if names.count(s.name) > 1:
            raise bad(f"two data.source are named {s.name!r}", "Give them a name each.")
    stages = tuple(_stage(i, s, names, bad) for i, s in enumerate(recipe.stage or r.default_stages()))
    if len({s.name for s in stages}) < len(stages):
        raise bad("two stages have the same name", "Give them a name each.")
    if len(recipe.optimizer.betas) != 2 or max(recipe.optimizer.betas) >= 1:
        raise bad(f"optimizer.betas is {list(recipe.optimizer.betas)}", "It takes two numbers below 1.")
    return dataclasses.replace(recipe, data=dataclasses.replace(data, shards=shards, source=sources), stage=stages)


def _stage(i: int, stage: r.StageRecipe, sources: list[str], bad: Any) -> r.StageRecipe:
    name = stage.name or f"{i + 1}-{stage.loss}"
    train = r.PARTS if "all" in stage.train else stage.train
    if bool(stage.steps) == bool(stage.tokens):
        raise bad(f"stage {name} has both steps and tokens, or neither", "Give it one of them.")
    if not train:
        raise bad(f"stage {name} trains nothing", f"train takes {', '.join(r.PARTS)}, all.")
    if stage.loss == "features" and train != ("jet",):
        raise bad(f"stage {name}: features train JetBlocks only", 'Set train = ["jet"].')
    if stage.loss == "logits" and not stage.kl_weight + stage.ce_weight:
        raise bad(f"stage {name}: kl_weight and ce_weight are both 0", "Set one of them above 0.")
    for source in stage.mixture:
        if source not in sources:
            raise bad(f"stage {name}: mixture names {source!r}", f"Sources: {', '.join(sources)}.")
    if stage.mixture and not sum(stage.mixture.values()):
        raise bad(f"stage {name}: mixture gives every source a weight of 0", "Set one above 0.")
    return dataclasses.replace(stage, name=name, train=tuple(train))
