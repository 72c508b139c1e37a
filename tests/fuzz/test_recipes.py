"""Recipes and space files with anything in them are read, or refused with one message."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzzing import damaged, fuzz, mutated
from helpers.paths import EXAMPLES
from hypothesis import example, given

from jet_export.model.presets import jet_2b
from jet_export.postnas.recipe_read import postnas_recipe_of, read_postnas_recipe
from jet_export.search.space import SPACES, read_space, space_of
from jet_export.training.recipe_read import check_recipe, read_recipe, recipe_of
from jet_export.utils.errors import JetExportError

RETROFIT = EXAMPLES / "retrofit/jet-2b-50m.toml"
POSTNAS = EXAMPLES / "postnas/toy.toml"
SPACE = SPACES / "paper.toml"
PRESET = jet_2b()


def refuses(call: Any, *args: Any) -> None:
    """Runs, or raises JetExportError, whose message is of a bearable length."""
    try:
        call(*args)
    except JetExportError as e:
        assert 10 < len(str(e)) < 1500, str(e)[:3000]


@given(mutated(tomllib.loads(RETROFIT.read_text()), root=False))
@fuzz(80)
def test_a_retrofits_recipe(values: Any) -> None:
    refuses(lambda: check_recipe(recipe_of(values, "r.toml")))


@given(mutated(tomllib.loads(POSTNAS.read_text()), root=False))
@example({**tomllib.loads(POSTNAS.read_text()), "teacher": "x" * 300})  # OSError: file name too long
@example({**tomllib.loads(POSTNAS.read_text()), "teacher": "**x"})  # ValueError of glob
@fuzz(80)
def test_a_postnas_recipe(values: Any) -> None:
    refuses(postnas_recipe_of, values, "p.toml", POSTNAS.parent)


@given(mutated(tomllib.loads(SPACE.read_text()), root=False))
@fuzz(80)
def test_a_space(values: Any) -> None:
    refuses(space_of, values, Path("s.toml"), PRESET)


@pytest.mark.parametrize(
    ("file", "read"),
    [(RETROFIT, read_recipe), (POSTNAS, read_postnas_recipe), (SPACE, lambda path: read_space(path, PRESET))],
    ids=["retrofit", "postnas", "space"],
)
def test_the_file(tmp_path: Path, file: Path, read: Any) -> None:
    path, original = tmp_path / "f.toml", file.read_bytes()

    @given(damaged(original))
    @example(original + b"\na = " + b"[" * 100_000)
    @example(original + b"\nseed = " + b"9" * 5000)
    @fuzz(60)
    def look(data: bytes) -> None:
        path.write_bytes(data)
        refuses(read, path)

    look()
