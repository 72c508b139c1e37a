"""Trains the teacher of the H200 run: `jet-export retrofit` of random weights, all layers attention, on next tokens.

    python benchmarks/postnas/teacher.py --output runs/postnas-teacher --minutes 9     # again until it says done

Leaves OUTPUT/teacher, a Qwen2 directory with jet-tiny's tokenizer. After --minutes it stops as at SIGTERM; the same
command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from pieces import pieces

from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.jet_nemotron import random_model
from jet_export.training.recipe_read import check_recipe, read_recipe
from jet_export.training.run import MODEL, run_retrofit
from jet_export.utils.files import replace_directory

LAYERS = 12
CONFIG = JetNemotronConfig(
    hidden_size=256, intermediate_size=704, layer_types=("attn",) * LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, jet_num_heads=1, head_k_dim=16, expand_v=2.0, vocab_size=4096,
    max_position_embeddings=2048, rope_theta=1e4, bos_token_id=0, eos_token_id=0, model_type="qwen2",
)  # fmt: skip


def write_qwen2(weights: Path | None, directory: Path, seed: int) -> None:
    """A Qwen2 directory of random weights, or of those of a model of attention layers alone."""
    tmp = directory.with_name(f".{directory.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    random_model(CONFIG, torch.bfloat16, seed=seed).save_pretrained(tmp)
    if weights is not None:
        shutil.copyfile(weights / "model.safetensors", tmp / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(JET_TINY_DIR / name, tmp / name)
    replace_directory(tmp, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("teacher.toml"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=9)
    args = parser.parse_args()
    recipe = read_recipe(args.recipe)
    start = args.output / "random"
    if not start.exists():
        args.output.mkdir(parents=True, exist_ok=True)
        write_qwen2(None, start, recipe.seed)
    student = replace(recipe.student, layers="a" * LAYERS)
    recipe = check_recipe(replace(recipe, teacher=str(start), student=student), str(args.recipe))
    run = args.output / "run"
    with pieces(args.minutes):
        if not run_retrofit(recipe, run, device=args.device, resume=True, emit=print):
            print("not done: run the same command again")
            return
    write_qwen2(run / MODEL, args.output / "teacher", recipe.seed)
    config = json.loads((args.output / "teacher/config.json").read_text())
    print(f"done: {args.output / 'teacher'}, {config['num_hidden_layers']} layers")


if __name__ == "__main__":
    main()
