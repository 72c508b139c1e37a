"""Toy models, rows and runs for the tests of training."""

import json
from pathlib import Path

import torch

from jet_export.training.data.rows import IGNORED, Row
from jet_export.training.distributed import Group
from jet_export.training.model import TrainingModel
from jet_export.training.recipe import Recipe
from jet_export.training.student import load_teacher, new_student, open_teacher, student_config

VOCAB = 257  # of the toy teacher: bytes, and the end of a text
ALONE = Group(0, 1, torch.device("cpu"), None)


def rows_of(lengths: list[list[int]], vocab: int, seed: int = 0) -> list[Row]:
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for row in lengths:
        tokens = [torch.randint(1, vocab, (n,), generator=rng).tolist() for n in row]
        labels = [t for s in tokens for t in (*s[1:], IGNORED)]
        rows.append(Row([t for s in tokens for t in s], labels, row))
    return rows


def models(recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[TrainingModel, TrainingModel]:
    files = open_teacher(recipe.teacher)
    teacher = load_teacher(files, dtype, torch.device("cpu"))
    return new_student(teacher, student_config(files.config, recipe.student), recipe), teacher


def log_of(output: Path) -> list[dict]:
    """log.jsonl, without what depends on time."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu", "seconds")} for line in lines]
