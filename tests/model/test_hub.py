"""What is fetched of a hub repository: weights, configuration, tokenizer and licence; Python files only on request."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from jet_export.model.hub import resolve_checkpoint

WANTED = (
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer/tokenizer.json",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
)


@pytest.mark.parametrize("code", [False, True])
def test_files_that_are_fetched(monkeypatch, tmp_path, code: bool) -> None:
    asked: dict[str, list[str]] = {}

    def download(hub_id: str, allow_patterns: list[str], tqdm_class: type | None) -> str:
        asked[hub_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_checkpoint("qwen3-1.7b", code) == Path(tmp_path)
    (patterns,) = asked.values()
    assert list(asked) == ["Qwen/Qwen3-1.7B-Base"]
    assert all(any(fnmatch(name, p) for p in patterns) for name in WANTED)
    assert any(fnmatch("modeling_jet_nemotron.py", p) for p in patterns) == code
    assert not any(fnmatch("pytorch_model.bin", p) for p in patterns)
