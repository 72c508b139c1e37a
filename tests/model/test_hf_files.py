"""Directories that others load: what save_pretrained, export-hf and bundles write, read by transformers 4.57 and 5."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import DATA, MINI_NAMES, load_golden
from helpers.paths import ROOT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from jet_export.model.hf_files import TOKENIZER_FILES, copy_tokenizer, tokenizer_directory
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.server.openai.chat import load_chat_template

SHARED = ROOT.parent / "shared" / "tokenizer"  # the published vocabulary, where it is there
TEXT = "def mean(values): 世界"


def words(directory: Path) -> Path:
    """The smallest tokenizer: tokenizer.json alone, and a chat template."""
    directory.mkdir()
    Tokenizer(WordLevel({"def": 0, "mean": 1}, unk_token="def")).save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return directory


@pytest.fixture
def saved(tmp_path) -> Path:
    """jet-tiny, loaded and saved."""
    JetNemotronForCausalLM.from_pretrained("jet-tiny").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("beside", [True, False])
def test_a_tokenizer_is_copied_from_either_place_and_read_in_its_own(tmp_path, beside: bool) -> None:
    source = words(tmp_path / "source")
    (source / "generation_config.json").write_text("{}")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        copy_tokenizer(source, tmp_path / name, beside)
        source = tmp_path / name
        assert tokenizer_directory(source) == source / "tokenizer"
        assert (source / "tokenizer.json").is_file() == beside
        assert (source / "generation_config.json").is_file()
        assert {p.name for p in (source / "tokenizer").iterdir()} <= set(TOKENIZER_FILES)
    (source / "tokenizer.json").write_text("damaged")
    assert load_tokenizer(source).encode("mean") == [1]
    template = load_chat_template(source)
    assert template is not None and template([{"role": "user", "content": "hi"}]) == "hi"


def test_the_old_place_is_read(tmp_path) -> None:
    source = words(tmp_path / "old")
    assert load_tokenizer(source).encode("mean") == [1]
    assert load_chat_template(source) is not None


def test_saved_models_keep_their_tokenizer(saved: Path) -> None:
    names = {p.name for p in saved.iterdir()}
    assert {"tokenizer", "tokenizer.json", "configuration_jet_nemotron.py", "config.json"} <= names
    again = JetNemotronForCausalLM.from_pretrained(saved)
    assert again.config == JetNemotronForCausalLM.from_pretrained("jet-tiny").config


def test_config_json_keeps_its_published_form(tmp_path) -> None:
    golden = load_golden(DATA / MINI_NAMES[0])
    golden.model(tmp_path / "in").save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    module, _, name = config.pop("auto_map")["AutoConfig"].partition(".")
    assert f"class {name}(" in (tmp_path / f"out/{module}.py").read_text()
    assert config == golden.config
    assert not (tmp_path / "out/tokenizer").exists()


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def test_autotokenizer_loads_without_flags(saved: Path) -> None:
    theirs = transformers().AutoTokenizer.from_pretrained(saved / "tokenizer")
    assert theirs(TEXT).input_ids == load_tokenizer(saved).encode(TEXT)


def test_autotokenizer_loads_the_published_vocabulary(tmp_path) -> None:
    auto = transformers().AutoTokenizer
    if not SHARED.is_dir():
        pytest.skip("the published tokenizer is not here")
    copy_tokenizer(SHARED, tmp_path, beside=False)
    theirs = auto.from_pretrained(tmp_path / "tokenizer")
    assert theirs(TEXT).input_ids == load_tokenizer(tmp_path).encode(TEXT)
    assert theirs.eos_token_id == 151643
    messages = [{"role": "user", "content": "hi"}]
    ours = load_chat_template(tmp_path)
    assert ours is not None
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ours(messages)


def test_autotokenizer_loads_a_tokenizer_json_alone(tmp_path) -> None:
    auto = transformers().AutoTokenizer
    (tmp_path / "to").mkdir()
    copy_tokenizer(words(tmp_path / "source"), tmp_path / "to", beside=False)
    assert auto.from_pretrained(tmp_path / "to/tokenizer")("mean").input_ids == [1]


def test_autoconfig_reads_and_writes_the_published_fields(saved: Path, tmp_path) -> None:
    auto = transformers().AutoConfig
    theirs = auto.from_pretrained(saved, trust_remote_code=True)
    ours = JetNemotronForCausalLM.from_pretrained(saved, torch.float32).config
    assert theirs.layer_types == list(ours.layer_types)
    assert theirs.efficient_attention_config == ours.to_dict()["efficient_attention_config"]
    assert (theirs.hidden_size, theirs.num_hidden_layers) == (ours.hidden_size, ours.num_hidden_layers)
    theirs.save_pretrained(tmp_path / "again")
    shutil.copyfile(saved / "model.safetensors", tmp_path / "again/model.safetensors")
    assert JetNemotronForCausalLM.from_pretrained(tmp_path / "again").config == ours
