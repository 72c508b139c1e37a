"""Checkpoints: fused parameters are filled and split exactly; damaged checkpoints are refused by name."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.golden import DATA, MINI_NAMES, Golden, load_golden, tensors_of
from helpers.paths import with_helpers
from safetensors.torch import save_file

from jet_export.model import weights
from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.model.weights import checkpoint_layout, is_finite
from jet_export.utils.errors import JetExportError, JetExportWarning


@pytest.fixture
def golden() -> Golden:
    return load_golden(DATA / MINI_NAMES[1])


@pytest.mark.parametrize("name", MINI_NAMES)
def test_save_returns_every_published_tensor(name: str, tmp_path) -> None:
    golden = load_golden(DATA / name)
    golden.model(tmp_path / "in").save_pretrained(tmp_path / "out")
    saved = tensors_of(tmp_path / "out")
    assert saved.keys() == golden.weights.keys()
    for key, tensor in golden.weights.items():
        assert torch.equal(saved[key].float(), tensor.float()), key
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.pop("auto_map") == {"AutoConfig": "configuration_jet_nemotron.JetNemotronConfig"}
    assert config == {**golden.config, "torch_dtype": str(golden.dtype).removeprefix("torch.")}  # the weights' own


def test_layout_covers_every_row_of_every_parameter_once(golden: Golden) -> None:
    config = JetNemotronConfig.from_dict(golden.config)
    rows: dict[str, list[tuple[int, int]]] = {}
    for s in checkpoint_layout(config).values():
        rows.setdefault(s.param, []).append((s.start, s.start + s.shape[0]))
    params = dict(random_model(config, torch.float32).named_parameters())
    assert rows.keys() == params.keys()
    for name, spans in rows.items():
        spans.sort()
        assert [a for a, _ in spans] == [0, *[b for _, b in spans[:-1]]], name
        assert spans[-1][1] == params[name].shape[0], name


def test_shards_and_one_file_load_alike(golden: Golden, tmp_path, monkeypatch) -> None:
    model = golden.model(tmp_path / "one")
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    model.save_pretrained(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    again = JetNemotronForCausalLM.from_pretrained(tmp_path / "many", golden.dtype)
    ids = golden.input_ids
    assert torch.equal(model(ids), again(ids))


def test_untied_lm_head(golden: Golden, tmp_path) -> None:
    golden.config["tie_word_embeddings"] = False
    golden.weights["lm_head.weight"] = 2 * golden.weights["model.embed_tokens.weight"]
    untied = golden.model(tmp_path / "untied")
    tied = load_golden(DATA / MINI_NAMES[1]).model(tmp_path / "tied")
    assert torch.allclose(untied(golden.input_ids), 2 * tied(golden.input_ids), rtol=1e-5)
    untied.save_pretrained(tmp_path / "out")
    assert "lm_head.weight" in tensors_of(tmp_path / "out")


def test_missing_tensor_is_named(golden: Golden, tmp_path) -> None:
    del golden.weights["model.layers.2.self_attn.A_log"]
    with pytest.raises(JetExportError, match=r"model.layers.2.self_attn.A_log missing"):
        golden.model(tmp_path)


def test_wrong_shape_is_named(golden: Golden, tmp_path) -> None:
    golden.weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 64)
    with pytest.raises(JetExportError, match=r"up_proj.weight has shape \[7, 64\], config.json asks for \[128, 64\]"):
        golden.model(tmp_path)


def test_truncated_file_is_named(golden: Golden, tmp_path) -> None:
    golden.save_checkpoint(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(JetExportError, match=r"model.safetensors: damaged or truncated"):
        JetNemotronForCausalLM.from_pretrained(tmp_path)


def test_missing_shard_is_named(golden: Golden, tmp_path, monkeypatch) -> None:
    model = golden.model(tmp_path / "one")
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    model.save_pretrained(tmp_path / "many")
    (tmp_path / "many/model-00002-of-00003.safetensors").unlink(missing_ok=True)
    gone = sorted((tmp_path / "many").glob("*.safetensors"))[-1]
    gone.unlink()
    with pytest.raises(JetExportError, match=r"no such file, though the index names it"):
        JetNemotronForCausalLM.from_pretrained(tmp_path / "many")


def test_directory_without_weights(golden: Golden, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(golden.config))
    with pytest.raises(JetExportError, match=r"no \*.safetensors file"):
        JetNemotronForCausalLM.from_pretrained(tmp_path)


LOAD = """
import sys, torch
import torch._dynamo  # which torch imports where a process makes its first model
from helpers.private_memory import PeakGrowth
from jet_export.model.jet_nemotron import JetNemotronForCausalLM

with PeakGrowth() as memory:
    model = JetNemotronForCausalLM.from_pretrained(sys.argv[1], torch.float32)
print(memory.grown)
"""


def test_loading_needs_the_model_and_little_more(golden: Golden, tmp_path) -> None:
    """A 300 MB model of many tensors: private memory grows by its size and less than 60 MB more."""
    values = {**golden.config, "hidden_size": 512, "intermediate_size": 4096, "vocab_size": 512}
    values |= {"layer_types": ["jet", "attn"] * 6, "num_hidden_layers": 12}
    model = random_model(JetNemotronConfig.from_dict(values), torch.float32)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size > 300e6
    model.save_pretrained(tmp_path)
    del model
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, env=with_helpers(), capture_output=True, text=True, check=True)
    assert size <= int(done.stdout) + 10e6
    assert int(done.stdout) < size + 60e6


def test_saving_needs_a_published_layout(golden: Golden, tmp_path) -> None:
    model = golden.model(tmp_path / "in")
    block: Any = model.layers[0].self_attn
    block.w2 = torch.nn.Identity()
    with pytest.raises(JetExportError, match=r"layers.0.self_attn.w2.bias is FP8"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extra_tensors_are_ignored(golden: Golden, tmp_path) -> None:
    reference = golden.model(tmp_path / "a")(golden.input_ids)
    golden.weights["model.rotary_emb.inv_freq"] = torch.zeros(3)
    save_file(golden.weights, tmp_path / "extra.safetensors")
    assert torch.equal(golden.model(tmp_path / "b")(golden.input_ids), reference)


def test_a_tensor_of_a_layer_beyond_the_count_is_refused(golden: Golden, tmp_path) -> None:
    golden.weights["model.layers.4.mlp.up_proj.weight"] = torch.zeros(128, 64)
    message = r"tensor model.layers.4.mlp.up_proj.weight is of layer 4, and config.json has 4 layers\.\nUse the config"
    with pytest.raises(JetExportError, match=message):
        golden.model(tmp_path)


def test_a_bias_that_the_config_does_not_have_is_refused(golden: Golden, tmp_path) -> None:
    golden.weights["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128)
    with pytest.raises(JetExportError, match=r"up_proj.bias is there, and config.json describes a model without it"):
        golden.model(tmp_path)


def test_other_unread_tensors_are_named(golden: Golden, tmp_path) -> None:
    golden.weights |= {"score.weight": torch.zeros(2), "model.layers.0.self_attn.gate.weight": torch.zeros(2)}
    with pytest.warns(JetExportWarning, match=r"not read: model.layers.0.self_attn.gate.weight, score.weight\."):
        golden.model(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.A_log", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused(golden: Golden, tmp_path, name: str, value: float) -> None:
    golden.weights[name] = golden.weights[name].clone()
    golden.weights[name].view(-1)[-1] = value
    with pytest.raises(JetExportError, match=rf"model.safetensors: {name} has a NaN or an infinity\.\nThe checkpoint"):
        golden.model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_is_finite(dtype: torch.dtype) -> None:
    """FP8 in pieces of 1,024 rows."""
    x = torch.randn(2050, 3).clamp(-2, 2).to(dtype)
    assert is_finite(x)
    for row in (0, 1023, 1024, 2049):
        y = x.clone()
        y[row, 1] = math.nan
        assert not is_finite(y)
