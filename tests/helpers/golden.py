"""Loading tests/data (and, where present, the larger goldens): outputs of the published implementation.

Each file holds a small random model's published tensors (`weight.*`), input ids, logits and states; metadata `config`
is its config.json and `chunks` how the prefill was split.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.paths import ROOT, TESTS
from jet_export.model.jet_nemotron import JetNemotronForCausalLM

DATA = TESTS / "data"
LARGE = Path(os.environ.get("JET_GOLDENS", ROOT.parent / "shared" / "goldens"))
MINI_NAMES = sorted(p.name for p in DATA.glob("*.safetensors"))
LARGE_NAMES = ["k128-bfloat16-b3-200-d8.safetensors", "s96-float32-b1-128_96-d4.safetensors"]


@dataclass
class Golden:
    config: dict
    chunks: list[int]
    weights: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["model.embed_tokens.weight"].dtype

    @property
    def input_ids(self) -> Tensor:
        return self.outputs["input_ids"]

    def save_checkpoint(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.weights, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(self.config))
        return directory

    def model(self, directory: Path, device: torch.device | str = "cpu") -> JetNemotronForCausalLM:
        return JetNemotronForCausalLM.from_pretrained(self.save_checkpoint(directory), self.dtype, device)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's shards; none is in two."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        shard = load_file(path)
        assert not shard.keys() & tensors.keys()
        tensors |= shard
    return tensors


def load_golden(path: Path) -> Golden:
    with safe_open(path, "pt") as f:
        meta = f.metadata()
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    outputs = {k: v for k, v in tensors.items() if not k.startswith("weight.")}
    return Golden(json.loads(meta["config"]), json.loads(meta["chunks"]), weights, outputs)
