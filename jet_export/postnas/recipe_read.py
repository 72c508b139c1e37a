"""Reads a PostNAS recipe from TOML. A mistake is one message: file, key, what is allowed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from jet_export.postnas import recipe as r
from jet_export.postnas.design import VARIANTS
from jet_export.postnas.recipe import PostnasRecipe
from jet_export.training.recipe import Recipe
from jet_export.training.recipe_read import check_recipe, recipe_of
from jet_export.utils.errors import JetExportError, shown
from jet_export.utils.schema import parse, read_toml

SEE = "docs/guides/postnas.md lists the keys."
TABLES = tuple(f.name for f in dataclasses.fields(r.PostnasTables))
SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}x[1-9]\d{0,4}")


def read_postnas_recipe(path: Path) -> PostnasRecipe:
    """The checked recipe. Relative paths in it are its directory's where they exist there, else the caller's."""
    return postnas_recipe_of(read_toml(path, str(path), SEE), str(path), path.parent)


def postnas_recipe_of(values: Mapping[str, Any], where: str, base: Path) -> PostnasRecipe:
    """The recipe of these values, as tomllib gives them."""
    for key in values:
        if key not in TABLES and key not in (f.name for f in dataclasses.fields(Recipe)):
            _bad(where, key[:80], "is not known", f"Known: {', '.join(TABLES)}, and what a retrofit's recipe has.")
    tables = parse(r.PostnasTables, {k: v for k, v in values.items() if k in TABLES}, where, SEE)
    training = recipe_of({k: v for k, v in values.items() if k not in TABLES}, where)
    if training.student.layers:
        _bad(where, "student.layers", "is set", "Placement chooses the layers: leave it out.")
    checked = check_recipe(dataclasses.replace(training, student=_with_layers(training, "j")), where)
    training = dataclasses.replace(checked, student=_with_layers(checked, ""))
    source = tuple(dataclasses.replace(s, path=_located(s.path, base)) for s in training.data.source)
    training = dataclasses.replace(training, data=dataclasses.replace(training.data, source=source))
    if training.teacher != r.TOY:
        training = dataclasses.replace(training, teacher=_located(training.teacher, base))
    recipe = PostnasRecipe(training=training, **{name: getattr(tables, name) for name in TABLES})
    return _checked(dataclasses.replace(recipe, task=_checked_tasks(tables.task, where, base)), where, base)


def _with_layers(recipe: Recipe, layers: str) -> Any:
    return dataclasses.replace(recipe.student, layers=layers)


def _located(path: str, base: Path) -> str:
    """A relative path under `base` if there is something, else as it is (a hub's id, a path from here)."""
    if not path or path.startswith(("/", "~")):
        return path
    there = base / path
    try:
        if there.exists():
            return str(there.resolve())
        return str(there) if any(base.glob(path)) else path
    except (OSError, ValueError, IndexError, NotImplementedError):  # no file name, and no pattern that glob takes
        return path


def _bad(where: str, key: str, what: str, todo: str = SEE) -> NoReturn:
    raise JetExportError(f"{where}: {key} {what}.", todo)


def _checked_tasks(tasks: tuple[r.TaskRecipe, ...], where: str, base: Path) -> tuple[r.TaskRecipe, ...]:
    if not tasks:
        _bad(where, "task", "is missing", "Write [[task]] with name, kind and path; one of kind loss at least.")
    out: list[r.TaskRecipe] = []
    for task in tasks:
        name = task.name or task.kind
        if not task.path:
            _bad(where, f"task {name}", "has no path", "Give it a file.")
        if name in (t.name for t in out) or name == "combined":
            _bad(where, f"task {name}", "is named as another", "Give it a name of its own; combined is taken.")
        out.append(dataclasses.replace(task, name=name, path=_located(task.path, base)))
    if not any(t.kind == "loss" for t in out):
        _bad(where, "task", "has none of kind loss", "Add one: its text is also what logits are compared on.")
    return tuple(out)


def _checked(recipe: PostnasRecipe, where: str, base: Path) -> PostnasRecipe:
    p, shapes = recipe.placement, recipe.shapes
    if bool(p.steps) == bool(p.tokens):
        _bad(where, "placement", "has both steps and tokens, or neither", "Give it one of them.")
    if not p.keep or p.choose not in p.keep:
        _bad(where, f"placement.choose {p.choose}", f"is not in placement.keep {shown(list(p.keep))}", "Add it there.")
    names = [t.name for t in recipe.task]
    if p.objective not in ("combined", *names):
        _bad(
            where, f"placement.objective {shown(p.objective)}", "is no task", f"It takes combined, {', '.join(names)}."
        )
    for name in ("block", "design", "shapes"):
        budget = getattr(recipe, name)
        if not budget.feature_steps + budget.logits_steps:
            _bad(where, name, "has no steps", "Set feature_steps or logits_steps.")
    if not shapes.logits_steps:
        _bad(where, "shapes.logits_steps", "is 0", "Halving needs a stage that can go on.")
    if bool(shapes.sizes) == bool(shapes.space):
        _bad(
            where, "shapes", "has both sizes and space, or neither", "Give it sizes (KxVxH), or a search's space file."
        )
    for size in shapes.sizes:
        if not SIZE.fullmatch(size):
            _bad(
                where, "shapes.sizes", f"has {shown(size)}", "A size is head_k_dim x head_v_dim x num_heads: 96x256x12."
            )
    for variant in recipe.design.variants:
        if variant not in VARIANTS:
            _bad(where, "design.variants", f"is {shown(variant)}", f"It takes {', '.join(VARIANTS)}.")
    designs = recipe.design.variants or VARIANTS
    design = dataclasses.replace(recipe.design, variants=designs)
    shapes = dataclasses.replace(shapes, space=_located(shapes.space, base))
    keep = tuple(sorted({0, *p.keep}))
    return dataclasses.replace(recipe, placement=dataclasses.replace(p, keep=keep), design=design, shapes=shapes)
