"""The legacy checkpoint: names, shapes and values of every tensor, and the fields that size TensorRT-LLM's states."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fp8_models import CONFIG, model_of, to_fp8
from safetensors.torch import load_file

from jet_export.build.export_hf import run_export
from jet_export.build.plan import BuildOptions
from jet_export.model.cache import state_specs
from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8 import FP8
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.presets import jet_2b, jet_4b
from jet_export.trtllm.engine_flow import LAYER, recurrent_fields, save_engine_flow
from jet_export.utils.errors import JetExportError

IDS = torch.arange(40)[None] * 3 % CONFIG.vocab_size


@pytest.fixture
def model() -> JetNemotronForCausalLM:
    model = model_of()
    to_fp8(model, IDS)
    for i, kind in enumerate(CONFIG.layer_types):
        if kind != "jet":
            attention: Any = model.layers[i].self_attn
            attention.k_scale, attention.v_scale = 0.5, 0.25
    return model


def saved(model, directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    save_engine_flow(model, directory, kv_fp8=True)
    assert {p.name for p in directory.iterdir()} == {"config.json", "rank0.safetensors"}
    assert len({p.stat().st_mode for p in directory.iterdir()}) == 1
    return json.loads((directory / "config.json").read_text()), load_file(directory / "rank0.safetensors")


def test_names_and_shapes(model, tmp_path) -> None:
    c, (config, tensors) = CONFIG, saved(model, tmp_path)
    h, f, D, R = c.hidden_size, c.intermediate_size, c.jet_value_dim, c.generator_dim
    HK, q, kv = c.jet_num_heads * c.head_k_dim, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    fp8 = {"mlp.fc": (f, h), "mlp.gate": (f, h), "mlp.proj": (h, f)}
    jet = {
        "recurrent.in_proj": (2 * HK + 2 * D + R, h),
        "recurrent.w2": (D * c.conv_size, R),
        "recurrent.o_proj": (h, D),
    }
    attn = {"attention.qkv": (q + 2 * kv, h), "attention.dense": (h, q)}
    H, V = c.jet_num_heads, c.head_v_dim
    plain = {
        "recurrent.ba_proj.weight": (2 * H, h),
        "recurrent.w2.bias": (D * c.conv_size,),
        "recurrent.A_log": (H,),
        "recurrent.dt_bias": (H,),
        "recurrent.o_norm": (V,),
    }
    expected = {
        "transformer.vocab_embedding.weight": (c.vocab_size, h),
        "transformer.ln_f.weight": (h,),
        "lm_head.weight": (c.vocab_size, h),
    }
    for i, kind in enumerate(c.layer_types):
        prefix = f"transformer.layers.{i}."
        for name, shape in {**fp8, **(jet if kind == "jet" else attn)}.items():
            expected |= {
                f"{prefix}{name}.weight": shape,
                f"{prefix}{name}.weights_scaling_factor": (1,),
                f"{prefix}{name}.activation_scaling_factor": (1,),
            }
            assert tensors[f"{prefix}{name}.weight"].dtype == FP8
        extra = (
            plain if kind == "jet" else {"attention.qkv.bias": (q + 2 * kv,), "attention.kv_cache_scaling_factor": (1,)}
        )
        extra = {**extra, "input_layernorm.weight": (h,), "post_layernorm.weight": (h,)}
        expected |= {prefix + name: shape for name, shape in extra.items()}
    assert {n: tuple(t.shape) for n, t in tensors.items()} == expected
    assert tensors["transformer.layers.1.attention.kv_cache_scaling_factor"].item() == 0.5
    assert config["legacy"].startswith("Legacy: for TensorRT-LLM's engine flow (1.2.1 to 1.3.0rc20)")


def test_values_are_the_models(model, tmp_path) -> None:
    """The tensors put back give the same logits, bit for bit."""
    _, tensors = saved(model, tmp_path)
    again = model_of()
    to_fp8(again, IDS)
    with torch.no_grad():
        for p in (*again.parameters(), *again.buffers()):
            p.view(torch.uint8).zero_()
    again.cos_sin = model.cos_sin
    assert not torch.equal(again(IDS), model(IDS))
    own = {**dict(again.named_parameters()), **dict(again.named_buffers())}
    own["embed_tokens.weight"].copy_(tensors["transformer.vocab_embedding.weight"])
    own["norm.weight"].copy_(tensors["transformer.ln_f.weight"])
    scales = {"weight_scale": "weights_scaling_factor", "input_scale": "activation_scaling_factor"}
    for name, target in own.items():
        if not name.startswith("layers."):
            continue
        _, i, path = name.split(".", 2)
        module, _, leaf = path.rpartition(".")
        prefix, leaf = f"transformer.layers.{i}", scales.get(leaf, leaf)
        if module == "mlp.gate_up_proj":
            parts = [tensors[f"{prefix}.mlp.{p}.{leaf}"] for p in ("fc", "gate")]
            source = (
                torch.cat([x.view(torch.uint8) for x in parts]).view(parts[0].dtype) if leaf == "weight" else parts[0]
            )
        elif module == "self_attn":
            source = tensors[f"{prefix}.recurrent.{leaf}"]
        else:
            kind = CONFIG.layer_types[int(i)]
            block = {"self_attn.o_proj": "recurrent.o_proj" if kind == "jet" else "attention.dense"}
            source = tensors[f"{prefix}.{ {**LAYER, **block}[module] }.{leaf}"]
        assert target.dtype == source.dtype
        target.copy_(source)
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("config", [jet_2b(), jet_4b(), CONFIG], ids=["jet-2b", "jet-4b", "mini"])
def test_fields_size_the_states_as_ours(config: JetNemotronConfig) -> None:
    """rnnStateManager.cpp's two shapes from the fields are jet::jet_block's pools."""
    f = recurrent_fields(config)
    rnn = (f["rnn_hidden_size"] // f["rnn_head_size"], f["state_size"], f["rnn_head_size"])
    conv = (f["conv_kernel"] - 1, f["rnn_conv_dim_size"])
    ours = {s.name: s for s in state_specs(config, torch.bfloat16)}
    for i, kind in enumerate(f["layer_types"]):
        assert (kind == "recurrent") == (config.layer_types[i] == "jet")
        if kind == "recurrent":
            assert ours[f"layers.{i}.recurrent_state"].shape == rnn
            assert ours[f"layers.{i}.recurrent_state"].dtype == torch.float32 == getattr(torch, f["state_dtype"])
            assert ours[f"layers.{i}.conv_state"].shape == conv


def test_quantisation_and_windows(model, tmp_path) -> None:
    config, _ = saved(model, tmp_path)
    assert config["quantization"]["quant_algo"] == config["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert config["quantization"]["exclude_modules"] == [
        "transformer.vocab_embedding",
        "lm_head",
        "transformer.layers.0.recurrent.ba_proj",
        "transformer.layers.3.recurrent.ba_proj",
    ]
    assert config["max_attention_window"] == [CONFIG.max_position_embeddings, CONFIG.window_size]
    assert JetNemotronConfig.from_dict(config["jet_nemotron"]) == CONFIG
    plain = model_of()
    (tmp_path / "bf16").mkdir()
    save_engine_flow(plain, tmp_path / "bf16", kv_fp8=False)
    config = json.loads((tmp_path / "bf16/config.json").read_text())
    assert config["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": None, "exclude_modules": None}


def test_command(tmp_path) -> None:
    lines: list[str] = []
    options = BuildOptions(model="jet-tiny", backend="onnx", device="cpu", output=tmp_path / "out")
    run_export(options, "trtllm-1.2", lines.append)
    assert lines[-1].startswith("Legacy: for TensorRT-LLM's engine flow")
    assert {"config.json", "rank0.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(JetExportError, match=r"--target trtllm-9: not known\.\nKnown: hf, trtllm-1\.2\."):
        run_export(options, "trtllm-9", lines.append)
