"""Recipes: the example's is read; a mistake is one message that names the file and the key."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import EXAMPLES, ROOT

from jet_export.postnas.design import VARIANTS
from jet_export.postnas.recipe import PostnasRecipe, letters, short_stages
from jet_export.postnas.recipe_read import postnas_recipe_of, read_postnas_recipe
from jet_export.postnas.shapes import rungs_of
from jet_export.utils.errors import JetExportError

TOY = EXAMPLES / "postnas/toy.toml"


def read(**changes: Any) -> PostnasRecipe:
    """The toy's recipe with these keys, "table__key", set; None: left out."""
    values = tomllib.loads(TOY.read_text())
    for key, value in changes.items():
        *tables, last = key.split("__")
        place = values
        for name in tables:
            place = place[name][0] if isinstance(place[name], list) else place.setdefault(name, {})
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    return postnas_recipe_of(values, "toy.toml", TOY.parent)


def test_paths_are_the_recipes_own_where_they_exist() -> None:
    recipe = read_postnas_recipe(TOY)
    assert Path(recipe.data.source[0].path) == ROOT / "jet_export/data/calibration.txt"
    assert Path(recipe.task[1].path) == EXAMPLES / "postnas/recall.jsonl"
    assert read(task__path="not/there").task[0].path == "not/there"
    assert recipe.training.teacher == "toy" and recipe.placement.keep == (0, 1)


def test_what_follows_from_it() -> None:
    recipe = read(design=None, shapes__rungs=3, shapes__eta=3, shapes__logits_steps=4)
    assert recipe.design.variants == VARIANTS and letters(4, (0, 2)) == "ajaj"
    assert [(s.name, s.steps) for s in short_stages(recipe.block)] == [("features", 6), ("logits", 4)]
    assert [(s.name, s.steps) for s in rungs_of(recipe.shapes)] == [
        ("features", 3), ("rung-0", 4), ("rung-1", 8), ("rung-2", 24),
    ]  # fmt: skip
    assert recipe.student("jjj", short_stages(recipe.block), seed=2).seed == recipe.training.seed + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placment": {}}, "placment is not known"),
        ({"placement__step": 3}, "placement.step is not known.\nKnown: steps, tokens"),
        ({"placement__steps": "3"}, "placement.steps is '3'.\nIt takes a whole number of at least 0"),
        ({"placement__steps": 2.5}, "placement.steps is 2.5"),
        ({"placement__beam": 0}, "placement.beam is 0.\nIt takes a whole number of at least 1"),
        ({"placement__lr": 0}, "placement.lr is 0.\nIt takes a number above 0"),
        ({"placement__lr": float("nan")}, "placement.lr is nan"),
        ({"placement__tokens": 100}, "placement has both steps and tokens"),
        ({"placement__choose": 3}, r"placement.choose 3 is not in placement.keep \[0, 1\]"),
        ({"placement__keep": 1}, "placement.keep is 1.\nIt takes a list"),
        ({"placement__objective": "maths"}, "placement.objective 'maths' is no task.\nIt takes combined, text, recall"),
        ({"block__blocks": ["gdn2"]}, "block.blocks is 'gdn2'.\nIt takes jet, gdn"),
        ({"block__feature_steps": 0, "block__logits_steps": 0}, "block has no steps"),
        ({"design__variants": ["3 taps", "tap"]}, "design.variants is 'tap'"),
        ({"shapes__sizes": ["16x32"]}, "shapes.sizes has '16x32'.\nA size is head_k_dim x head_v_dim x num_heads"),
        ({"shapes__space": "s.toml"}, "shapes has both sizes and space"),
        ({"shapes__eta": 1}, "shapes.eta is 1.\nIt takes a whole number of at least 2"),
        ({"shapes__logits_steps": 0}, "shapes.logits_steps is 0"),
        ({"task": []}, "task is missing"),
        ({"task": {}}, r"task is {}, not a list of tables.\nWrite \[\[task\]\]"),
        ({"task__kind": "score"}, "task.kind is 'score'.\nIt takes loss, recall, completion"),
        ({"task__kind": "completion"}, "task has none of kind loss"),
        ({"task__name": "recall"}, "task recall is named as another"),
        ({"task__path": ""}, "task text has no path"),
        ({"student__layers": "jja"}, "student.layers is set.\nPlacement chooses the layers"),
        ({"teacher": None}, "no teacher"),
        ({"stage__lr": -1}, "stage.lr is -1"),
    ],
)
def test_a_mistake_is_one_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JetExportError, match=f"toy.toml: {message}"):
        read(**changes)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(JetExportError, match=r"none.toml: no such file"):
        read_postnas_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(JetExportError, match=r"bad.toml: not valid TOML"):
        read_postnas_recipe(tmp_path / "bad.toml")
