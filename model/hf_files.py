"""What lies beside the weights in a Hugging Face directory, so that others load it: config.json and its Python file,
and the tokenizer in a directory of its own.

transformers 5 checks `layer_types` of every config.json and does not know jet, swa and attn. AutoTokenizer reads the
config.json beside a tokenizer, so it fails there; from `tokenizer/` it loads without flags. AutoConfig loads the
directory with trust_remote_code: `auto_map` names the Python file, whose class keeps `layer_types` as published.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jet_export.utils.files import DATA

if TYPE_CHECKING:  # front ends read tokenizers, and load no torch
    import torch

TOKENIZER_DIRECTORY = "tokenizer"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
GENERATION_CONFIG = "generation_config.json"
CONFIGURATION = DATA / "hf" / "configuration_jet_nemotron.py"
AUTO_MAP = {"AutoConfig": "configuration_jet_nemotron.JetNemotronConfig"}


def tokenizer_directory(directory: str | Path) -> Path:
    """Where a checkpoint or a bundle has its tokenizer: in `tokenizer/`, or beside the rest."""
    own = Path(directory) / TOKENIZER_DIRECTORY
    return own if (own / TOKENIZER).is_file() else Path(directory)


def copy_tokenizer(source: Path, to: Path, beside: bool) -> None:
    """Copy a directory's tokenizer to `to`/tokenizer, and generation_config.json to `to`. `beside`: the tokenizer's
    files to `to` as well, where software other than transformers 5 looks for them."""
    if (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, to / GENERATION_CONFIG)
    found = tokenizer_directory(source)
    if not (found / TOKENIZER).is_file():
        return
    (to / TOKENIZER_DIRECTORY).mkdir(exist_ok=True)
    for place in (to / TOKENIZER_DIRECTORY, *((to,) if beside else ())):
        for name in TOKENIZER_FILES:
            if (found / name).is_file():
                shutil.copyfile(found / name, place / name)
        if not (place / TOKENIZER_CONFIG).is_file():  # without one, AutoTokenizer asks for a config.json
            (place / TOKENIZER_CONFIG).write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')


def write_config(values: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """config.json, and for Jet-Nemotron the file that its `auto_map` names. dtype: of the weights beside it, under both
    of transformers' names if the one of transformers 5 was read."""
    names = ("torch_dtype", "dtype") if "dtype" in values else ("torch_dtype",)
    values = {**values, **dict.fromkeys(names, str(dtype).removeprefix("torch."))}
    if values["model_type"] == "jet_nemotron":
        shutil.copyfile(CONFIGURATION, directory / CONFIGURATION.name)
        values = {**values, "auto_map": AUTO_MAP}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
