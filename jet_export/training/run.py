"""A whole retrofit: stages in their order, each from the last checkpoint, and the model at the end.

OUTPUT/recipe.json, log.jsonl, checkpoints/step-*, tensorboard/, and OUTPUT/model, which `jet-export build` takes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from jet_export.model.config import JetNemotronConfig
from jet_export.model.weights import CheckpointFiles, save_checkpoint
from jet_export.training.checkpoint import Checkpoints, Progress
from jet_export.training.data.shard import Encode
from jet_export.training.data.stream import DataStream
from jet_export.training.data.tokenizer import load_encoder
from jet_export.training.distributed import Group, processes, shard, whole
from jet_export.training.flops import flops_per_token, peak_flops
from jet_export.training.model import TrainingModel
from jet_export.training.objective import FeatureObjective, LogitsObjective, Objective
from jet_export.training.recipe import Recipe, StageRecipe
from jet_export.training.report import Report
from jet_export.training.stop import stop_at_signals
from jet_export.training.student import (
    inference_model,
    load_teacher,
    new_student,
    open_teacher,
    set_trainable,
    student_config,
)
from jet_export.training.trainer import Setting, Trainer, saved_parameters
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import check_directory, replace_directory, write_atomically

RECIPE = "recipe.json"
MODEL = "model"
CHECKPOINTS = "checkpoints"


class Retrofit:
    """A checked recipe with its teacher, tokenizer and student's config: what the stages share."""

    def __init__(self, recipe: Recipe, output: Path, device: str, encode: Encode | None = None) -> None:
        """Reads the teacher's config and tokenizer (unless `encode` stands for it), no weights. Raises JetExportError
        for what does not fit."""
        self.recipe, self.output, self.device = recipe, output, device
        self.files: CheckpointFiles = open_teacher(recipe.teacher)
        self.config: JetNemotronConfig = student_config(self.files.config, recipe.student)
        if recipe.data.sequence_length > self.config.max_position_embeddings:
            raise JetExportError(
                f"data.sequence_length is {recipe.data.sequence_length}, and the teacher takes "
                f"{self.config.max_position_embeddings} positions.",
                "Lower it.",
            )
        source = Path(recipe.data.tokenizer) if recipe.data.tokenizer else self.files.directory
        self.encode: Encode = encode or load_encoder(source, self.config)

    def models(self, group: Group) -> tuple[TrainingModel, TrainingModel]:
        """(student, teacher) as a run begins, the student untrained and neither sharded."""
        named = self.recipe.run.dtype
        half = named == "bfloat16" or (named == "auto" and group.device.type == "cuda")
        teacher = load_teacher(self.files, torch.bfloat16 if half else torch.float32, group.device)
        student = new_student(teacher, self.config, self.recipe)
        for layer in (*student.training_layers, *teacher.training_layers):
            layer.activation_checkpointing = self.recipe.run.activation_checkpointing
        return student, teacher

    def objective(self, stage: StageRecipe, group: Group) -> tuple[Objective, TrainingModel | None]:
        """What the stage minimises, with models that are sharded; and the teacher, if the stage needs it."""
        student, teacher = self.models(group)
        set_trainable(student, stage.train)
        needed = stage.loss == "features" or stage.kl_weight > 0
        student = shard(student, group)
        if not needed:
            return LogitsObjective(student, None, stage), None
        teacher = shard(teacher, group)
        if stage.loss == "features":
            return FeatureObjective(student, teacher), teacher
        return LogitsObjective(student, teacher, stage), teacher

    def stream(self, stage: StageRecipe, group: Group, states: dict[str, Any]) -> DataStream:
        """The stage's rows of this process, from these states on."""
        data = self.recipe.data
        weights = {s.name: (stage.mixture.get(s.name, 0.0) if stage.mixture else s.weight) for s in data.source}
        return DataStream(data, self.encode, self.recipe.seed, weights, group.rank, group.world, states)

    def run_stage(self, setting: Setting, progress: Progress) -> tuple[Progress, bool]:
        """Train a stage on. Returns where it is then, and whether the run goes on."""
        stage, group = self.recipe.stage[progress.stage], setting.group
        stream = self.stream(stage, group, progress.shards)
        try:
            objective, teacher = self.objective(stage, group)
            if self.recipe.run.compile:  # not for evaluation, whose batches have many shapes
                for model in (objective.student, teacher) if teacher else (objective.student,):
                    model.compile_layers()
            trainer = Trainer(setting, stage, objective, progress)
            trainer.load()
            flops = flops_per_token(objective.student, teacher, stage)
            goes_on = trainer.run(stream, flops, peak_flops(group.device))
        finally:
            stream.close()
        return trainer.progress, goes_on

    def save_model(self, checkpoints: Checkpoints, progress: Progress, group: Group) -> None:
        """OUTPUT/model from the last checkpoint: bf16, published names, with the teacher's tokenizer."""
        student, _ = self.models(group)
        student = shard(student, group)
        checkpoints.load(progress, saved_parameters(student, self.recipe, progress.stage))
        tensors = {name: whole(p) for name, p in student.named_parameters()}
        if group.first:
            model = inference_model(self.config, tensors, torch.bfloat16)
            tmp = self.output / f".{MODEL}"
            shutil.rmtree(tmp, ignore_errors=True)
            try:
                save_checkpoint(model, tmp, self.files.directory)
                replace_directory(tmp, self.output / MODEL)
            except (OSError, SafetensorError) as e:
                shutil.rmtree(tmp, ignore_errors=True)
                raise JetExportError(
                    f"{self.output / MODEL} cannot be written ({e}). The checkpoints are kept.",
                    "Free some space and go on with --resume.",
                ) from None
        group.barrier()


def run_retrofit(recipe: Recipe, output: Path, *, device: str, resume: bool, emit: Callable[[str], None]) -> bool:
    """Run a checked recipe, or go on with it. Returns whether it ended: False after a stop that was asked for.

    Raises JetExportError for what does not fit, and for what a stage cannot go on after: the last checkpoint stays.
    """
    check_directory(output)
    check_output(output, recipe, resume)
    with processes(device) as group, stop_at_signals() as stop:
        retrofit = Retrofit(recipe, output, device)
        if recipe.data.shards % group.world:
            retrofit.stream(recipe.stage[0], group, {})  # refuses
        if group.first:
            write_atomically(output / RECIPE, json.dumps(recipe.identity(), indent=1) + "\n")
        group.barrier()
        checkpoints = Checkpoints(output / CHECKPOINTS, group, recipe.checkpoint.keep, recipe.checkpoint.asynchronous)
        progress = checkpoints.last() or Progress()
        report = Report(
            output if group.first else None, emit, done=progress.step, total=recipe.total_steps,
            every=recipe.run.log_every, tensorboard=recipe.run.tensorboard,
        )  # fmt: skip
        setting = Setting(recipe=recipe, group=group, checkpoints=checkpoints, report=report, stop=stop)
        try:
            for line in plan_lines(retrofit, group):
                report.say(line)
            while True:
                if progress.stage_step < recipe.steps_of(recipe.stage[progress.stage]):
                    progress, goes_on = retrofit.run_stage(setting, progress)
                    if not goes_on:
                        report.say(f"stopped after step {progress.step:,}; its checkpoint is written: --resume goes on")
                        return False
                    progress = checkpoints.last() or progress
                if progress.stage + 1 == len(recipe.stage):
                    break
                progress = replace(progress, stage=progress.stage + 1, stage_step=0)
            retrofit.save_model(checkpoints, progress, group)
            report.say(f"{output / MODEL}: {progress.step:,} steps, {progress.tokens:,} tokens")
            report.say(f"Next: jet-export build --model {output / MODEL}")
            return True
        finally:
            report.close()


def plan_lines(retrofit: Retrofit, group: Group) -> list[str]:
    """What is about to be trained."""
    recipe, config = retrofit.recipe, retrofit.config
    kinds = {kind: config.layer_types.count(kind) for kind in ("jet", "swa", "attn")}
    layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    of = sorted({str(config.jet_dims(i)) for i, kind in enumerate(config.layer_types) if kind == "jet"})
    return [
        f"teacher    {recipe.teacher}: {config.num_hidden_layers} layers",
        f"student    {layers}" + (f"; JetBlocks {', '.join(of)} (K x V x heads)" if of else ""),
        f"data       {len(recipe.data.source)} source{'s' * (len(recipe.data.source) > 1)}, "
        f"{recipe.tokens_per_step:,} tokens a step, {group.world} process{'es' * (group.world > 1)}",
    ]


def check_output(output: Path, recipe: Recipe, resume: bool) -> None:
    """Raises JetExportError for a run that is there already, or one of another recipe."""
    path = output / RECIPE
    if not path.exists():
        return
    if not resume:
        raise JetExportError(
            f"--output {output}: a run is there already.", "Go on with it by --resume, or name another directory."
        )
    check_same_recipe(path, recipe.identity(), "--resume")


def check_same_recipe(path: Path, identity: Any, where: str) -> None:
    """`path`: the recipe of the run that is there. Raises JetExportError, beginning with `where`, if it differs."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise JetExportError(f"{path}: damaged.", "Start again in another --output.") from None
    found = difference(there, json.loads(json.dumps(identity)))
    if found is not None:
        key, old, new = found
        raise JetExportError(
            f"{where}: {key} was {old!r} and is {new!r} now.",
            "Only [run] and [checkpoint] may change; name another --output for a new run.",
        )


def difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(key, old, new) of the first value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            if found := difference(old.get(name), new.get(name), f"{key}.{name}" if key else name):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{key}[{i}]"))), None)
    return None if old == new else (key, old, new)
