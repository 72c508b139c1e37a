"""The run's teacher: a Qwen2 of full-attention layers, trained by `jet_export.training` from random weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.jet_nemotron import random_model
from jet_export.postnas.session import MODELS, Session, train, trained
from jet_export.training.checkpoint import Checkpoints, Progress
from jet_export.training.distributed import whole
from jet_export.training.recipe import Recipe
from jet_export.training.run import Retrofit
from jet_export.training.student import inference_model
from jet_export.training.trainer import saved_parameters
from jet_export.utils.files import replace_directory

CONFIG = JetNemotronConfig(  # 6.9 M parameters; jet-tiny, of 7 layers, has 5.4 M
    hidden_size=256, intermediate_size=384, layer_types=("attn",) * 12, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, jet_num_heads=1, head_k_dim=16, expand_v=2.0, vocab_size=4096,
    max_position_embeddings=2048, rope_theta=1e4, bos_token_id=0, eos_token_id=0, model_type="qwen2",
)  # fmt: skip
TOY = replace(
    CONFIG, hidden_size=64, intermediate_size=64, layer_types=("attn",) * 4, num_attention_heads=4, head_dim=16
)


def write_qwen2(config: JetNemotronConfig, weights: Path | None, directory: Path, seed: int) -> None:
    """A Qwen2 directory of random weights, or of those of a model of attention layers alone."""
    tmp = directory.with_name(f".{directory.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    random_model(config, seed=seed).save_pretrained(tmp)
    if weights is not None:
        shutil.copyfile(weights / "model.safetensors", tmp / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(JET_TINY_DIR / name, tmp / name)
    replace_directory(tmp, directory)


def train_stage(session: Session, recipe: Recipe, config: JetNemotronConfig, stage: int, output: Path) -> Progress:
    """The recipe's stages up to number `stage`; the last one's end leaves `output`/teacher. Raises Stopped.

    A stage's checkpoint keeps the parameters and not the moments, which the next stage does not take: what one call has
    to carry to the next is a third as large."""
    if not (output / "random").exists():
        write_qwen2(config, None, output / "random", recipe.seed)
    retrofit, run = Retrofit(recipe, output, session.device), output / "teacher-run"
    progress = train(session, retrofit, run, stage + 1)
    student = trained(session, retrofit, run, progress)
    if stage + 1 == len(recipe.stage):
        import torch

        tensors = {name: whole(p) for name, p in student.named_parameters()}
        model = inference_model(retrofit.config, tensors, torch.bfloat16)
        model.save_pretrained(output / ".weights")
        write_qwen2(config, output / ".weights", output / "teacher", recipe.seed)
        shutil.rmtree(output / ".weights")
        shutil.rmtree(run / MODELS)
    else:
        checkpoints = Checkpoints(run / MODELS, session.group, 1, False)
        checkpoints.save(saved_parameters(student, recipe, stage), progress, wait=True)
    return progress
