"""A toy teacher whose tokens are bytes, and a recipe for it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.retrofits import VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import random_model
from jet_export.training.recipe import (
    CheckpointRecipe,
    DataRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
    StageRecipe,
    StudentRecipe,
)
from jet_export.training.recipe_read import check_recipe
from jet_export.utils.files import DATA

TEACHER = JetNemotronConfig(
    hidden_size=32, intermediate_size=48, layer_types=("attn",) * 3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, jet_num_heads=1, head_k_dim=16, expand_v=2.0, vocab_size=VOCAB, max_position_embeddings=256,
    rope_theta=1e4, bos_token_id=0, eos_token_id=0, model_type="qwen2",
)  # fmt: skip


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 directory of three layers."""
    directory = tmp_path_factory.mktemp("teacher")
    random_model(TEACHER, torch.bfloat16, seed=1).save_pretrained(directory)
    letters = {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0, **letters}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def recipe(teacher: Path) -> Recipe:
    """Nine steps in three stages: features, logits, everything by next tokens. Four rows of 64 tokens a step."""
    return check_recipe(
        Recipe(
            teacher=str(teacher),
            student=StudentRecipe(layers="jas", num_heads=2, head_k_dim=16, head_v_dim=32, window_size=24),
            data=DataRecipe(
                sequence_length=64, batch=4, shards=2, source=(SourceRecipe(path=str(DATA / "heldout.txt")),)
            ),
            stage=(
                StageRecipe(name="features", loss="features", steps=3, lr=2e-3),
                StageRecipe(name="logits", steps=4, lr=1e-3, ce_weight=0.5, schedule="wsd"),
                StageRecipe(name="all", train=("all",), steps=2, lr=1e-3, kl_weight=0.0, ce_weight=1.0),
            ),
            checkpoint=CheckpointRecipe(every=2, keep=2),
            run=RunRecipe(log_every=1, micro_batch=2, tensorboard=False),
        )
    )


def with_run(recipe: Recipe, **changes: object) -> Recipe:
    return replace(recipe, run=replace(recipe.run, **changes))  # type: ignore[arg-type]
