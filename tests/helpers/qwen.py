"""Small random Qwen2 and Qwen3 checkpoints with the logits and the greedy tokens of transformers, in tests/data/qwen.

Each file: `weight.<name>`, `input_ids` [B, T], `logits` [B, T, vocab], `prompt` [P] and `greedy` [N]; metadata `config`
is the config.json that transformers wrote, `transformers` its version. qwen2 was written by 4.57, qwen3 by 5, whose
config.json has rope_parameters. To write one again:

    python -m helpers.qwen qwen2
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.golden import DATA, Golden

QWEN = DATA / "qwen"
KINDS = ("qwen2", "qwen3")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
}
PER_KIND: dict[str, dict[str, Any]] = {  # Qwen3: head_dim is not hidden_size / heads, lm_head has its own weights
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
}


def load_qwen(kind: str) -> Golden:
    with safe_open(QWEN / f"{kind}.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    return Golden(config, [], weights, {k: v for k, v in tensors.items() if not k.startswith("weight.")})


def outputs(model: Any, input_ids: Tensor, prompt: Tensor, new: int) -> dict[str, Tensor]:
    """Of a model of transformers: logits, and greedy tokens, each from all tokens before it, without a cache."""
    ids = prompt
    with torch.no_grad():
        logits = model(input_ids).logits
        for _ in range(new):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
    return {"input_ids": input_ids, "logits": logits, "prompt": prompt, "greedy": ids[len(prompt) :]}


def write(kind: str) -> None:
    import transformers

    rng = torch.Generator().manual_seed(7)
    name = kind.capitalize()
    config = getattr(transformers, f"{name}Config")(rope_theta=1e6, **SIZES, **PER_KIND[kind])
    if hasattr(config, "rope_parameters"):  # transformers 5
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, p in model.named_parameters():
        p.data.normal_(1.0, 0.3, generator=rng) if "norm" in key else p.data.normal_(0.0, 0.15, generator=rng)
    ids = torch.randint(config.vocab_size, (2, 70), generator=rng)
    found = outputs(model, ids, torch.randint(config.vocab_size, (9,), generator=rng), 24)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        weights = load_file(Path(directory) / "model.safetensors")
        written = (Path(directory) / "config.json").read_text()
    QWEN.mkdir(exist_ok=True)
    tensors = {**{f"weight.{k}": v for k, v in weights.items()}, **found}
    meta = {"config": written, "transformers": transformers.__version__}
    save_file({k: v.contiguous() for k, v in tensors.items()}, QWEN / f"{kind}.safetensors", meta)


if __name__ == "__main__":
    write(sys.argv[1])
