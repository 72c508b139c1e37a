"""The toy teacher: random weights of a Qwen2 of three narrow layers, with jet-tiny's tokenizer. It knows nothing: a run
with it shows that the pipeline works on a machine, and nothing of quality."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.jet_nemotron import random_model
from jet_export.utils.files import replace_directory

CONFIG = JetNemotronConfig(
    hidden_size=32, intermediate_size=48, layer_types=("attn",) * 3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, jet_num_heads=1, head_k_dim=16, expand_v=2.0, vocab_size=4096, max_position_embeddings=2048,
    rope_theta=1e4, bos_token_id=0, eos_token_id=0, model_type="qwen2",
)  # fmt: skip


def make_toy_teacher(directory: Path, seed: int) -> None:
    """Writes it, unless it is there."""
    if directory.exists():
        return
    tmp = directory.with_name(f".{directory.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    random_model(CONFIG, torch.bfloat16, seed=seed).save_pretrained(tmp)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(JET_TINY_DIR / name, tmp / name)
    replace_directory(tmp, directory)
