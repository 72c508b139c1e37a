"""config.json, safetensors headers and shard indexes with anything in them are read, or refused with one message."""

import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.fuzzing import changed, damaged, fuzz, mutated, paths, without
from helpers.qwen import load_qwen
from hypothesis import example, given
from hypothesis import strategies as st

from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8_blocks import block_size
from jet_export.model.fp8_checkpoint import check_quant_algo, is_fp8_checkpoint
from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.utils.errors import JetExportError

MINI = mini_config().to_dict()
QWEN35 = load_qwen("qwen3_5").config
INDEX = "model.safetensors.index.json"


def _with_jet(values: dict[str, Any], **jet: Any) -> dict[str, Any]:
    mixers = values["efficient_attention_config"]
    return {**values, "efficient_attention_config": {**mixers, "jet": {**mixers["jet"], **jet}}}


FAMILIES: dict[str, dict[str, Any]] = {
    "jet-tiny": json.loads((JET_TINY_DIR / "config.json").read_text()),
    "jet_nemotron": {
        **_with_jet(MINI, layers={"0": {"head_dim": 32, "expand_v": 2, "num_heads": 2}}),
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
    },
    "qwen2": load_qwen("qwen2").config,
    "qwen3": load_qwen("qwen3").config,
    "qwen3_5": {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": QWEN35},
}
ODD: list[Any] = [None, True, -1, 0, 0.5, 2**31, 2**70, 10**400, 1e308, math.nan, "", "x", [], [None], {}, {"x": {}}]
ODD += ["x" * 5000]  # found in config.json: repeated whole in messages


def refuses(call: Any, *args: Any) -> None:
    """Runs, or raises JetExportError."""
    try:
        call(*args)
    except JetExportError as e:
        assert 10 < len(str(e)) < 1500, str(e)[:300]


@pytest.mark.filterwarnings("ignore:.*not known here, and ignored")
@given(st.sampled_from(sorted(FAMILIES)).flatmap(lambda family: mutated(FAMILIES[family])))
@example(_with_jet(MINI, expand_v=1e308))  # OverflowError
@example(_with_jet(MINI, layers={"0": {"head_dim": 16, "expand_v": 1e308, "num_heads": 1}}))
@example(_with_jet(MINI, layers={"9" * 5000: {}}))  # ValueError: too many digits
@example(_with_jet(MINI, layers={"x": None}))  # TypeError
@example({**MINI, "quantization_config": "fp8"})  # AttributeError: no get
@example({**QWEN35, "linear_key_head_dim": 2**31})  # hung: expand_v in the smallest of steps
@fuzz(120)
def test_configs(values: Any) -> None:
    """Of every family. What is accepted is written as what is read again."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(values))
        refuses(_read, path)


@pytest.mark.filterwarnings("ignore:.*not known here, and ignored")
@pytest.mark.parametrize("family", ["jet_nemotron", "qwen3", "qwen3_5"])
def test_every_key_of_a_config_with_every_hostile_value(family: str) -> None:
    """Not by chance: each place once with each value, and once without."""
    values = FAMILIES[family]
    for path in paths(values):
        for value in ODD:
            refuses(_read_values, changed(values, path, value))
        if path:
            refuses(_read_values, without(values, path))


def _read(path: Path) -> None:
    config = JetNemotronConfig.from_json_file(path)
    assert JetNemotronConfig.from_dict(config.to_dict()) == config
    is_fp8_checkpoint(config)
    check_quant_algo(path.parent, config)


def _read_values(values: Any) -> None:
    if isinstance(values, dict):  # as every reader of a file has made sure of
        config = JetNemotronConfig.from_dict(values, "config.json")
        is_fp8_checkpoint(config)
        block_size(config, "config.json")


@pytest.mark.filterwarnings("ignore:.*not known here, and ignored")
def test_config_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    @given(damaged(json.dumps(MINI).encode()))
    @example(b"[" * 100_000)
    @example(b'{"hidden_size": ' + b"9" * 5000 + b"}")
    @fuzz(100)
    def look(data: bytes) -> None:
        path.write_bytes(data)
        refuses(_read, path)

    look()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and their index."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = random_model(mini_config(), torch.float32, "cpu", 0, max_positions=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jet_export.model.weights.SHARD_BYTES", 2**17)
        model.save_pretrained(directory)
    assert (directory / INDEX).exists()
    return directory


def _load(directory: Path) -> None:
    JetNemotronForCausalLM.from_pretrained(directory, torch.float32, "cpu", 64)


def test_shard_indexes(checkpoint: Path) -> None:
    path = checkpoint / INDEX
    original = path.read_text()

    @given(mutated(json.loads(original)))
    @example({"weight_map": {"model.norm.weight": "../other.safetensors"}})
    @example({"weight_map": {"model.norm.weight": "\ud800"}})  # UnicodeEncodeError
    @fuzz(30)
    def look(values: Any) -> None:
        path.write_text(json.dumps(values))
        refuses(_load, checkpoint)

    try:
        look()
    finally:
        path.write_text(original)


def test_safetensors_headers(checkpoint: Path) -> None:
    path = min(checkpoint.glob("*.safetensors"))
    original = path.read_bytes()
    size = struct.unpack("<Q", original[:8])[0]
    header, body = json.loads(original[8 : 8 + size]), original[8 + size :]

    @given(mutated(header))
    @fuzz(30)
    def look(values: Any) -> None:
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        refuses(_load, checkpoint)

    @given(damaged(original[:400]))
    @example(struct.pack("<Q", 2**63))
    @fuzz(30)
    def cut(start: bytes) -> None:
        path.write_bytes(start + original[400:])
        refuses(_load, checkpoint)

    try:
        look()
        cut()
    finally:
        path.write_bytes(original)
