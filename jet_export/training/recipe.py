"""Recipe: what a retrofit trains, on what, and how. The types say what `recipe_read` takes from TOML."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from jet_export.utils.schema import MOST, Count, NonNegative, OneOrMany, Positive, Share, Size, one_of

PARTS = ("jet", "attention", "mlp", "norms", "embeddings")
Part = Annotated[str, one_of(*PARTS)]


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """The student's mixers. Sizes that are 0 come from the teacher: as many heads, K = head_dim, V = 2 * head_dim."""

    layers: str = ""  # a letter a layer (j, a, s), a preset, or a config.json
    num_heads: Count = 0
    head_k_dim: Count = 0
    head_v_dim: Count = 0
    conv_size: Annotated[int, Field(ge=2, le=MOST)] = 4
    window_size: Count = 0
    init: Annotated[str, one_of("random", "repeat", "svd")] = "random"  # of JetBlocks' q, k, v, o


@dataclass(frozen=True, kw_only=True)
class SourceRecipe:
    """Documents: files (`path`, which may be a glob) or a dataset of the Hugging Face hub (`hf`)."""

    name: str = ""
    path: str = ""
    hf: str = ""
    config: str = ""  # of the hub's dataset
    split: str = "train"
    format: Annotated[str, one_of("auto", "text", "jsonl", "parquet", "hf")] = "auto"  # by the file's suffix
    field: str = "text"  # of a JSON line or a table's row
    separator: str = "<|endoftext|>"  # between the documents of a text file
    weight: Positive = 1.0  # share of the documents, relative to the other sources'


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Packed rows: a step takes `batch` rows of `sequence_length` tokens, drawn from `shards` independent streams."""

    sequence_length: Annotated[int, Field(ge=2, le=MOST)] = 4096
    batch: Size = 8
    shards: Count = 0  # 0: the largest divisor of `batch` up to 8. The number of processes must divide it
    tokenizer: str = ""  # a directory; default: the teacher's
    source: tuple[SourceRecipe, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """A stage: which parts train, on which loss, for how long. Each stage begins with a new optimizer."""

    name: str = ""
    loss: Annotated[str, one_of("features", "logits")] = "logits"
    train: Annotated[tuple[Annotated[str, one_of(*PARTS, "all")], ...], OneOrMany] = ("jet",)
    steps: Count = 0
    tokens: NonNegative = 0.0  # in place of steps
    lr: Positive = 1e-4
    lr_scale: dict[Part, NonNegative] = field(default_factory=dict)  # by part
    kl_weight: NonNegative = 1.0
    ce_weight: NonNegative = 0.0
    temperature: Positive = 1.0
    schedule: Annotated[str, one_of("cosine", "wsd", "constant")] = "cosine"
    warmup: Share = 0.02  # share of the steps
    decay: Share = 0.2  # share of the steps at the end, of wsd
    min_lr: Share = 0.1  # share of lr at the end
    mixture: dict[str, NonNegative] = field(default_factory=dict)  # weights of the sources, by name; default: theirs


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW."""

    betas: tuple[Share, ...] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0  # of matrices
    clip: NonNegative = 1.0  # of the gradient's norm; 0: none


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    every: Size = 500  # steps
    keep: Size = 2
    asynchronous: bool = True


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """How it runs. May change when a run is resumed; all else may not."""

    dtype: Annotated[str, one_of("auto", "bfloat16", "float32")] = (
        "auto"  # of activations and frozen weights: bfloat16 on a GPU, else float32
    )
    micro_batch: Size = 1  # rows that a process takes at once
    activation_checkpointing: bool = False
    compile: bool = False
    log_every: Size = 10  # steps between lines where there is no terminal
    tensorboard: bool = True  # where it is installed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    teacher: str = ""  # a directory, or a hub id
    seed: Count = 0
    student: StudentRecipe = StudentRecipe()
    data: DataRecipe = DataRecipe()
    stage: tuple[StageRecipe, ...] = ()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    run: RunRecipe = RunRecipe()

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch * self.data.sequence_length

    def steps_of(self, stage: StageRecipe) -> int:
        return stage.steps or math.ceil(stage.tokens / self.tokens_per_step)

    @property
    def total_steps(self) -> int:
        return sum(map(self.steps_of, self.stage))

    @property
    def trained(self) -> frozenset[str]:
        """The parts that some stage trains: their weights are fp32 from the beginning."""
        return frozenset(part for stage in self.stage for part in stage.train)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it continues; JSON types only."""
        values = asdict(self)
        del values["run"], values["checkpoint"]
        return values


def default_stages() -> tuple[StageRecipe, ...]:
    """Features, then logits, with the learning rates and tokens of RADLADS (arXiv 2505.03005)."""
    return (
        StageRecipe(name="features", loss="features", tokens=100e6, lr=1e-3),
        StageRecipe(name="logits", loss="logits", tokens=600e6, lr=1e-4),
    )
