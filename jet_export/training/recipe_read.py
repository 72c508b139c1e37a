"""Reads a recipe from TOML, and checks what goes together. A mistake is one message: file, key, what is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jet_export.training import recipe as r
from jet_export.training.recipe import Recipe
from jet_export.utils.errors import JetExportError, shown
from jet_export.utils.schema import parse, read_toml

SEE = "docs/guides/retrofit.md lists the keys."


def read_recipe(path: Path) -> Recipe:
    """Raises JetExportError naming the file, the key and the values it takes."""
    return recipe_of(read_toml(path, f"--recipe {path}", SEE), f"--recipe {path}")


def recipe_of(values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of these values, as tomllib gives them; not yet checked as a whole (`check_recipe`)."""
    return parse(Recipe, values, where, SEE)


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
            raise bad(f"two data.source are named {shown(s.name)}", "Give them a name each.")
    stages = tuple(_stage(i, s, names, bad) for i, s in enumerate(recipe.stage or r.default_stages()))
    if len({s.name for s in stages}) < len(stages):
        raise bad("two stages have the same name", "Give them a name each.")
    if len(recipe.optimizer.betas) != 2 or max(recipe.optimizer.betas) >= 1:
        raise bad(f"optimizer.betas is {shown(list(recipe.optimizer.betas))}", "It takes two numbers below 1.")
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
            raise bad(f"stage {name}: mixture names {shown(source)}", f"Sources: {', '.join(sources)}.")
    if stage.mixture and not sum(stage.mixture.values()):
        raise bad(f"stage {name}: mixture gives every source a weight of 0", "Set one above 0.")
    return dataclasses.replace(stage, name=name, train=tuple(train))
