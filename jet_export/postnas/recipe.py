"""The recipe of a PostNAS run: a retrofit's recipe (teacher, data, stages of the last step) and a table a step.

`recipe_read` reads it from TOML.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from jet_export.training.recipe import DataRecipe, Recipe, StageRecipe
from jet_export.utils.schema import MOST, Count, NonNegative, Positive, Size, one_of

STEPS = ("placement", "block", "design", "shapes", "retrofit")
BLOCKS = ("jet", "gdn", "deltanet", "gla", "retnet", "mamba2", "kda", "rwkv7")
TOY = "toy"  # as teacher: a random one that the run makes in OUTPUT/teacher


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """What models are compared by.

    loss        next-token loss of held-out text
    recall      JSONL of text with lines K72=9183 and, later, K72?9183: share of values that are the most likely tokens
    completion  JSONL of prompts and answers (code, say): share of answers whose tokens are all the most likely ones
    """

    name: str = ""
    kind: Annotated[str, one_of("loss", "recall", "completion")] = "loss"
    path: str = ""
    field: str = "text"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    length: Count = 0  # tokens of an item at most; 0: data.sequence_length
    items: Size = 64  # at most
    weight: Positive = 1.0  # in the combined objective


@dataclass(frozen=True, kw_only=True)
class PlacementRecipe:
    """Step 1."""

    steps: Count = 0
    tokens: NonNegative = 0.0  # of the supernet's training, in place of steps
    lr: Positive = 1e-3
    kl_weight: NonNegative = 0.0  # of the path's logits beside its features
    keep: tuple[Count, ...] = (0, 1, 2, 4)  # numbers of attention layers that are looked at
    beam: Size = 4
    objective: str = "combined"  # or a task: whose placement the next steps take
    choose: Count = 2  # attention layers that the next steps keep; one of `keep`


@dataclass(frozen=True, kw_only=True)
class BudgetRecipe:
    """A short retrofit: features, then logits. Every candidate of a step gets the same."""

    feature_steps: Count = 200
    logits_steps: Count = 200
    lr: Positive = 1e-3
    logits_lr: Positive = 3e-4
    seeds: Size = 1


@dataclass(frozen=True, kw_only=True)
class BlockRecipe(BudgetRecipe):
    """Step 2."""

    blocks: tuple[Annotated[str, one_of(*BLOCKS)], ...] = BLOCKS


@dataclass(frozen=True, kw_only=True)
class DesignRecipe(BudgetRecipe):
    """Step 3: variants of the JetBlock, each of which differs from it in one choice (`design.VARIANTS`)."""

    variants: tuple[str, ...] = ()  # default: all


@dataclass(frozen=True, kw_only=True)
class ShapesRecipe(BudgetRecipe):
    """Step 4: successive halving. Every size trains; the better 1 / eta of them trains on for eta times as many steps
    of logits; those left after `rungs` have a score."""

    sizes: tuple[str, ...] = ()  # KxVxH, of one number of state elements
    space: str = ""  # a space file of `jet-export search`, in place of sizes: engines are measured, and latency counts
    rungs: Size = 2
    eta: Annotated[int, Field(ge=2, le=MOST)] = 2


@dataclass(frozen=True, kw_only=True)
class PostnasTables:
    """What a PostNAS recipe has beside a retrofit's."""

    task: tuple[TaskRecipe, ...] = ()
    placement: PlacementRecipe = PlacementRecipe()
    block: BlockRecipe = BlockRecipe()
    design: DesignRecipe = DesignRecipe()
    shapes: ShapesRecipe = ShapesRecipe()


@dataclass(frozen=True, kw_only=True)
class PostnasRecipe(PostnasTables):
    training: Recipe  # its stages are the last step's; its student's layers are chosen by the first

    @property
    def data(self) -> DataRecipe:
        return self.training.data

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it continues; JSON types only."""
        values = {k: v for k, v in asdict(self).items() if k != "training"}
        return {**self.training.identity(), **values}

    def student(self, layers: str, stages: tuple[StageRecipe, ...], seed: int = 0) -> Recipe:
        """The recipe of a retrofit with these layers, seed numbers counting from the recipe's own."""
        student = replace(self.training.student, layers=layers)
        return replace(self.training, student=student, stage=stages, seed=self.training.seed + seed)


def short_stages(budget: BudgetRecipe) -> tuple[StageRecipe, ...]:
    """Of a short retrofit."""
    features = StageRecipe(name="features", loss="features", steps=budget.feature_steps, lr=budget.lr)
    logits = StageRecipe(name="logits", loss="logits", steps=budget.logits_steps, lr=budget.logits_lr)
    return tuple(stage for stage in (features, logits) if stage.steps)


def letters(layers: int, attention: tuple[int, ...]) -> str:
    """student.layers of a placement: a where attention stays, else j."""
    return "".join("a" if i in attention else "j" for i in range(layers))
