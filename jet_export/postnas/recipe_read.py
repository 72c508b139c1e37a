"""Reads a PostNAS recipe from TOML. A mistake is one message: file, key, what is allowed."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jet_export.postnas import recipe as r
from jet_export.postnas.design import VARIANTS
from jet_export.postnas.recipe import PostnasRecipe
from jet_export.training.recipe import Recipe
from jet_export.training.recipe_read import check_recipe, recipe_of
from jet_export.utils.errors import JetExportError

T = TypeVar("T")
SEE = "docs/guides/postnas.md lists the keys."
TABLES: dict[str, type[Any]] = {
    "placement": r.PlacementRecipe,
    "block": r.BlockRecipe,
    "design": r.DesignRecipe,
    "shapes": r.ShapesRecipe,
}
CHOICES: dict[str, tuple[str, ...]] = {"task.kind": r.TASK_KINDS, "block.blocks": r.BLOCKS, "design.variants": VARIANTS}
SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}x[1-9]\d{0,4}")
AT_LEAST_ONE = ("beam", "seeds", "items", "rungs")
ABOVE_ZERO = ("lr", "logits_lr", "weight")


def read_postnas_recipe(path: Path) -> PostnasRecipe:
    """The checked recipe. Relative paths in it are its directory's where they exist there, else the caller's."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JetExportError(f"{path}: no such file.", SEE) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as e:
        raise JetExportError(f"{path}: not valid TOML: {e}.", SEE) from None
    return postnas_recipe_of(values, str(path), path.parent)


def postnas_recipe_of(values: Mapping[str, Any], where: str, base: Path) -> PostnasRecipe:
    """The recipe of these values, as tomllib gives them."""
    for key in values:
        if key not in (*TABLES, "task") and key not in (f.name for f in dataclasses.fields(Recipe)):
            _bad(where, key, "is not known", f"Known: task, {', '.join(TABLES)}, and what a retrofit's recipe has.")
    training = recipe_of({k: v for k, v in values.items() if k not in (*TABLES, "task")}, where)
    if training.student.layers:
        _bad(where, "student.layers", "is set", "Placement chooses the layers: leave it out.")
    checked = check_recipe(dataclasses.replace(training, student=_with_layers(training, "j")), where)
    training = dataclasses.replace(checked, student=_with_layers(checked, ""))
    source = tuple(dataclasses.replace(s, path=_located(s.path, base)) for s in training.data.source)
    training = dataclasses.replace(training, data=dataclasses.replace(training.data, source=source))
    if training.teacher != r.TOY:
        training = dataclasses.replace(training, teacher=_located(training.teacher, base))
    listed = values.get("task", [])
    if not isinstance(listed, list):
        _bad(where, "task", "is not a list of tables", "Write [[task]].")
    tasks = tuple(_table(r.TaskRecipe, task, "task", where) for task in listed)
    tables: dict[str, Any] = {name: _table(cls, values.get(name, {}), name, where) for name, cls in TABLES.items()}
    recipe = PostnasRecipe(training=training, task=_checked_tasks(tasks, where, base), **tables)
    return _checked(recipe, where, base)


def _with_layers(recipe: Recipe, layers: str) -> Any:
    return dataclasses.replace(recipe.student, layers=layers)


def _located(path: str, base: Path) -> str:
    """A relative path under `base` if there is something, else as it is (a hub's id, a path from here)."""
    if not path or Path(path).expanduser().is_absolute():
        return path
    there = base / path
    found = there.exists() or any(base.glob(path))
    return str(there.resolve() if there.exists() else there) if found else path


def _bad(where: str, key: str, what: str, todo: str = SEE) -> NoReturn:
    raise JetExportError(f"{where}: {key} {what}.", todo)


def _table(cls: type[T], values: Any, name: str, where: str) -> T:
    if not isinstance(values, Mapping):
        _bad(where, name, f"is {values!r}, not a table")
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            _bad(where, f"{name}.{key}", "is not known", f"Known: {', '.join(types)}.")
    return cls(**{key: _value(types[key], value, f"{name}.{key}", where) for key, value in values.items()})


def _value(kind: Any, value: Any, key: str, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            _bad(where, key, f"is {value!r}", "It takes a list.")
        return tuple(_value(typing.get_args(kind)[0], v, key, where) for v in value)
    if kind is str:
        if not isinstance(value, str):
            _bad(where, key, f"is {value!r}", "It takes a string.")
        if key in CHOICES and value not in CHOICES[key]:
            _bad(where, key, f"is {value!r}", f"It takes {', '.join(CHOICES[key])}.")
        return value
    last = key.rpartition(".")[2]
    least = 2 if last == "eta" else 1 if last in AT_LEAST_ONE else 0
    number = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not number or value < least or (last in ABOVE_ZERO and value == 0):
        takes = "a whole number" if kind is int else "a number"
        _bad(
            where, key, f"is {value!r}", f"It takes {takes} {'above' if last in ABOVE_ZERO else 'of at least'} {least}."
        )
    return kind(value)


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
        _bad(where, f"placement.choose {p.choose}", f"is not in placement.keep {list(p.keep)}", "Add it there.")
    names = [t.name for t in recipe.task]
    if p.objective not in ("combined", *names):
        _bad(where, f"placement.objective {p.objective!r}", "is no task", f"It takes combined, {', '.join(names)}.")
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
            _bad(where, "shapes.sizes", f"has {size!r}", "A size is head_k_dim x head_v_dim x num_heads: 96x256x12.")
    designs = recipe.design.variants or VARIANTS
    design = dataclasses.replace(recipe.design, variants=designs)
    shapes = dataclasses.replace(shapes, space=_located(shapes.space, base))
    keep = tuple(sorted({0, *p.keep}))
    return dataclasses.replace(recipe, placement=dataclasses.replace(p, keep=keep), design=design, shapes=shapes)
