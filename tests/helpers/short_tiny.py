"""jet-tiny cut to three of its seven trained layers, one of each kind."""

import json
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.jet_nemotron import JetNemotronForCausalLM

LAYERS = {1: "jet", 2: "swa", 4: "attn"}


def write_short_tiny(directory: Path) -> Path:
    """A published checkpoint of these layers, with jet-tiny's tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((JET_TINY_DIR / "config.json").read_text())
    assert [config["layer_types"][i] for i in LAYERS] == list(LAYERS.values())
    depth = {"layer_types": list(LAYERS.values()), "num_hidden_layers": len(LAYERS), "max_window_layers": len(LAYERS)}
    (directory / "config.json").write_text(json.dumps(config | depth))
    places = {str(layer): str(i) for i, layer in enumerate(LAYERS)}
    tensors = {}
    for name, tensor in load_file(JET_TINY_DIR / "model.safetensors").items():
        start, _, rest = name.partition("model.layers.")
        layer, _, path = rest.partition(".")
        if start or not rest:
            tensors[name] = tensor
        elif layer in places:
            tensors[f"model.layers.{places[layer]}.{path}"] = tensor
    save_file(tensors, directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(JET_TINY_DIR / name, directory / name)
    return directory


def short_tiny(max_positions: int, dtype: torch.dtype = torch.bfloat16) -> JetNemotronForCausalLM:
    with TemporaryDirectory() as directory:
        checkpoint = write_short_tiny(Path(directory))
        return JetNemotronForCausalLM.from_pretrained(checkpoint, dtype, max_positions=max_positions)
