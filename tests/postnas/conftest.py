"""The toy teacher, its pair with a student of JetBlocks, and short recipes."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.paths import EXAMPLES
from helpers.retrofits import models, rows_of

from jet_export.postnas.recipe import PostnasRecipe
from jet_export.postnas.recipe_read import read_postnas_recipe
from jet_export.postnas.toy import make_toy_teacher
from jet_export.training.data.rows import Batch
from jet_export.training.model import TrainingModel

TOY = EXAMPLES / "postnas/toy.toml"
LAYERS = 3


@pytest.fixture(scope="session")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("postnas") / "teacher"
    make_toy_teacher(directory, seed=0)
    return directory


@pytest.fixture(scope="session")
def toy() -> PostnasRecipe:
    """The example's, as it is."""
    return read_postnas_recipe(TOY)


@pytest.fixture(scope="session")
def recipe(toy: PostnasRecipe) -> PostnasRecipe:
    """The example with few and short rows, and few steps."""
    training = toy.training
    stage = tuple(replace(s, steps=2) for s in training.stage)
    data = replace(training.data, sequence_length=48)
    return replace(
        toy,
        training=replace(training, stage=stage, data=data, run=replace(training.run, log_every=1)),
        task=tuple(replace(t, items=2, length=96) for t in toy.task),
        placement=replace(toy.placement, steps=4),
        block=replace(toy.block, feature_steps=2, logits_steps=1),
        design=replace(toy.design, variants=("static v",), feature_steps=2, logits_steps=1),
        shapes=replace(toy.shapes, feature_steps=1, logits_steps=1),
    )


@pytest.fixture(scope="session")
def pair(recipe: PostnasRecipe, teacher_directory: Path) -> tuple[TrainingModel, TrainingModel]:
    """(student of JetBlocks alone, teacher)."""
    made = replace(recipe, training=replace(recipe.training, teacher=str(teacher_directory)))
    return models(made.student("j" * LAYERS, made.training.stage[:1]))


@pytest.fixture
def batch() -> Batch:
    return Batch.of(rows_of([[20, 12], [32]], 4096))
