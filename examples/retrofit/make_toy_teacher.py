"""Writes a Qwen2 directory of random weights, four layers of 64, with jet-tiny's tokenizer: a teacher for toy.toml.

python examples/retrofit/make_toy_teacher.py toy-teacher
jet-export retrofit --recipe examples/retrofit/toy.toml --teacher toy-teacher --data corpus.txt --output runs/toy
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.jet_nemotron import random_model

CONFIG = JetNemotronConfig(
    hidden_size=64,
    intermediate_size=96,
    layer_types=("attn",) * 4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    jet_num_heads=1,  # not used: there is no JetBlock
    head_k_dim=16,
    expand_v=2.0,
    vocab_size=4096,
    max_position_embeddings=512,
    rope_theta=1e4,
    bos_token_id=0,
    eos_token_id=0,
    model_type="qwen2",
)


def write_toy_teacher(directory: Path, seed: int = 0) -> Path:
    random_model(CONFIG, torch.bfloat16, seed=seed).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(JET_TINY_DIR / name, directory / name)
    return directory


if __name__ == "__main__":
    print(write_toy_teacher(Path(sys.argv[1])))
