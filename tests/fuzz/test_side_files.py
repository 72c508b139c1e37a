"""A checkpoint's generation_config.json and tokenizer files, which a bundle has as they are, with anything in them."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzzing import damaged, fuzz, mutated
from hypothesis import example, given

from jet_export.model.hub import JET_TINY_DIR
from jet_export.runtime.tokenizer import load_eos, load_tokenizer
from jet_export.server.openai.defaults import load_sampling_defaults
from jet_export.utils.errors import JetExportError

GENERATION = {"eos_token_id": [0, 1], "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
TOKENIZER = {
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    "bos_token": {"content": "<s>", "special": True},
    "eos_token": "</s>",
}


def refuses(call: Any, *args: Any) -> None:
    """Runs, or raises JetExportError."""
    try:
        call(*args)
    except JetExportError as e:
        assert 10 < len(str(e)) < 1500, str(e)[:300]


def test_generation_configs(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"

    @given(mutated(GENERATION))
    @example([])
    @example({"top_k": 10**400})  # OverflowError of isfinite
    @fuzz(80)
    def look(values: Any) -> None:
        path.write_text(json.dumps(values))
        refuses(load_sampling_defaults, tmp_path)
        refuses(load_eos, tmp_path, 0, 99)

    look()


def test_tokenizer_configs(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    from jet_export.server.openai.chat import load_chat_template

    path = tmp_path / "tokenizer_config.json"

    @given(mutated(TOKENIZER))
    @example([])
    @example({**TOKENIZER, "chat_template": ["x"]})
    @example({**TOKENIZER, "bos_token": [1]})
    @fuzz(80)
    def look(values: Any) -> None:
        path.write_text(json.dumps(values))
        refuses(load_chat_template, tmp_path)

    look()


def test_tokenizers(tmp_path: Path) -> None:
    original = (JET_TINY_DIR / "tokenizer.json").read_bytes()
    path = tmp_path / "tokenizer.json"

    @given(damaged(original[:3000]))
    @example(original[:3000].replace(b'"behavior": "', b'"behavior": "' + b"x" * 5000))  # repeated whole
    @fuzz(30)
    def look(start: bytes) -> None:
        path.write_bytes(start + original[3000:])
        refuses(load_tokenizer, tmp_path)

    look()
