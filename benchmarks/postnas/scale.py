"""Scale: the recipes of the run, as committed or at a toy's size, with the paths of its directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from teacher import CONFIG, TOY

from jet_export.model.config import JetNemotronConfig
from jet_export.postnas.recipe import BudgetRecipe, PostnasRecipe
from jet_export.postnas.recipe_read import read_postnas_recipe
from jet_export.training.recipe import DataRecipe, Recipe
from jet_export.training.recipe_read import check_recipe, read_recipe

B = TypeVar("B", bound=BudgetRecipe)
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Scale:
    postnas: PostnasRecipe
    teacher: Recipe
    config: JetNemotronConfig  # the teacher's
    items: int  # of each task in piece models; 0: all
    limits: dict[str, str]  # of the engine

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers


def recipes(output: Path, toy: bool, eager: bool = False) -> Scale:
    """The recipes with `output` in place of runs/shown; `eager`: nothing is compiled by torch.compile."""
    config = TOY if toy else CONFIG
    teacher, postnas = read_recipe(HERE / "teacher.toml"), read_postnas_recipe(HERE / "h200.toml")
    student = replace(teacher.student, layers="a" * config.num_hidden_layers)
    teacher = replace(teacher, teacher=str(output / "random"), student=student, data=_moved(teacher.data, output))
    training = replace(postnas.training, teacher=str(output / "teacher"), data=_moved(postnas.data, output))
    tasks = tuple(replace(t, path=str(output / "data" / Path(t.path).name)) for t in postnas.task)
    postnas = replace(postnas, training=training, task=tasks)
    limits = {"max-batch-size": "64", "max-seq-len": "2048", "prefill-chunk": "1024"}
    if eager:
        postnas = replace(postnas, training=replace(training, run=replace(training.run, compile=False)))
    if toy:
        teacher, postnas = _toy_training(teacher), _toy(postnas)
        limits = {"max-batch-size": "2", "max-seq-len": "256", "prefill-chunk": "64"}
    return Scale(
        postnas=postnas,
        teacher=check_recipe(teacher, "teacher.toml"),
        config=config,
        items=4 if toy else 0,
        limits=limits,
    )


def _moved(data: DataRecipe, output: Path) -> DataRecipe:
    return replace(data, source=tuple(replace(s, path=str(output / "data" / Path(s.path).name)) for s in data.source))


def _toy_training(recipe: Recipe) -> Recipe:
    """Four steps a stage of two rows, in autocast as on a GPU."""
    data = replace(recipe.data, sequence_length=128, batch=2, shards=2)
    stages = tuple(replace(s, steps=4) for s in recipe.stage)
    student = replace(recipe.student, num_heads=2, head_k_dim=16, head_v_dim=32)
    return replace(
        recipe,
        data=data,
        stage=stages,
        student=student,
        run=replace(recipe.run, micro_batch=2, log_every=4, dtype="bfloat16", compile=False),
    )


def _short(budget: B) -> B:
    return replace(budget, feature_steps=2, logits_steps=2)


def _toy(recipe: PostnasRecipe) -> PostnasRecipe:
    return replace(
        recipe,
        training=_toy_training(recipe.training),
        task=tuple(replace(t, items=2, length=1024 if t.kind == "recall" else 128) for t in recipe.task),
        placement=replace(recipe.placement, steps=4, keep=(0, 1, 2), beam=1, choose=1),
        block=_short(recipe.block),
        design=replace(_short(recipe.design), variants=("jet", "static v", "no gate")),
        shapes=replace(_short(recipe.shapes), sizes=("16x32x2", "32x32x1")),
    )
