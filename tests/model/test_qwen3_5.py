"""Qwen3.5: Gated DeltaNets and gated attention, against what transformers made of the same small random checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.golden import Golden, tensors_of
from helpers.qwen import in_blocks, load_qwen, outputs, random_qwen, states
from safetensors.torch import save_file

from jet_export.backends.eager import EagerEngine
from jet_export.build.export_hf import run_export, save_unified
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import parameter_count
from jet_export.model.cache import states_per_layer
from jet_export.model.config import JetNemotronConfig
from jet_export.model.config_keys import unknown_keys
from jet_export.model.fp8 import Fp8Linear
from jet_export.model.hub import load_config
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError, JetExportWarning

TOLERANCE = 1e-5  # fp32, 64 tokens
# Moving this model's weights by half a unit in the last place moves its logits by 9e-6 and a state by 5e-6, moving them
# by 3e-7 twice as much; a GPU's exp and rsqrt are 2e-7 off, and its products sum in another order.
PLACED = 3e-5 if torch.cuda.is_available() else TOLERANCE


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_qwen("qwen3_5")


@pytest.fixture(scope="module")
def model(golden: Golden, tmp_path_factory) -> JetNemotronForCausalLM:
    return golden.model(tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(scope="module")
def placed(golden: Golden, tmp_path_factory, device) -> JetNemotronForCausalLM:
    """The same on the GPU, where there is one."""
    return golden.model(tmp_path_factory.mktemp("placed"), device)


@pytest.mark.parametrize("chunks", [[64], [1, 2, 61], [50] + [1] * 14], ids=["whole", "split", "decode"])
def test_logits_and_states_are_those_of_transformers(golden: Golden, placed, device, chunks: list[int]) -> None:
    ids, out = golden.input_ids.to(device), golden.outputs
    cache = placed.new_cache(*ids.shape)
    logits = torch.cat([placed(part, cache=cache) for part in ids.split(chunks, 1)], 1)
    assert relative_error(logits, out["logits"]) < PLACED
    checked = []
    for i, state in enumerate(states_per_layer(placed.config, cache.states)):
        if placed.config.layer_types[i] == "jet":
            conv, recurrent = state
            assert relative_error(recurrent, out[f"state.{i}.recurrent"]) < PLACED
            # theirs is [B, C, 4], and its oldest column is never read
            assert relative_error(conv, out[f"state.{i}.conv"][:, :, 1:].mT) < PLACED
            checked.append(i)
    assert checked == [0, 1, 2]


def test_a_padded_row_is_as_it_is_alone(golden: Golden, placed, device) -> None:
    """Ragged batches: 64 and 23 tokens, the shorter padded on the left."""
    ids, pad = golden.input_ids.to(device), 41
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    shifted = torch.stack([ids[0], torch.cat([ids[1, :pad] * 0, ids[1, : 64 - pad]])])
    logits = placed(shifted, attention_mask=mask)
    assert relative_error(logits[0], golden.outputs["logits"][0]) < PLACED
    assert relative_error(logits[1, pad:], golden.outputs["logits"][1, : 64 - pad]) < PLACED


@pytest.mark.parametrize(
    ("dtype", "tokens", "limit"),
    [(torch.float32, 64, PLACED), (torch.float32, 200, 3e-3), (torch.bfloat16, 200, 5e-2)],
    ids=["short", "long", "bf16"],
)
def test_published_widths_against_transformers(dtype: torch.dtype, tokens: int, limit: float, tmp_path, device) -> None:
    """Heads as published (K = V = 128, attention's of 256), another model than the goldens': both run here, side by
    side, on the GPU where there is one. The bounds are Jet-Nemotron's."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "Qwen3_5ForCausalLM"):
        pytest.skip("this transformers has no Qwen3.5")
    rng = torch.Generator().manual_seed(5)
    heads = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 4, "head_dim": 256}
    theirs = random_qwen("qwen3_5", rng, hidden_size=256, intermediate_size=192, **heads)
    theirs.to(dtype).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval().to(device)
    model = JetNemotronForCausalLM.from_pretrained(tmp_path, dtype, device)
    ids = torch.randint(theirs.config.vocab_size, (2, tokens), generator=rng).to(device)
    cache, split = model.new_cache(*ids.shape), tokens - 3
    parts = [ids[:, :split], *ids[:, split:].split(1, 1)]  # a prefill, then decode
    logits = torch.cat([model(part, cache=cache) for part in parts], 1)
    with torch.no_grad():
        assert relative_error(logits, theirs(ids).logits) < limit


def test_greedy_tokens_are_those_of_transformers(golden: Golden, placed) -> None:
    """By the runtime over an eager engine: prompts in chunks of 4 beside each other, then decode."""
    engine = EagerEngine(placed, Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=4))
    llm = LLM.over(engine, ByteTokenizer(), placed.config.eos_token_id)
    prompt, greedy = golden.outputs["prompt"].tolist(), golden.outputs["greedy"].tolist()
    made = llm.generate([prompt, prompt[:5]], max_new_tokens=len(greedy))
    assert made[0].token_ids == greedy


def test_the_outputs_are_those_of_the_transformers_that_is_installed(golden: Golden, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "Qwen3_5ForCausalLM"):
        pytest.skip("this transformers has no Qwen3.5")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(golden.save_checkpoint(tmp_path)).float().eval()
    now = outputs(theirs, golden.input_ids, golden.outputs["prompt"], 2) | states(theirs, golden.input_ids)
    for name in now.keys() - {"input_ids", "prompt", "greedy"}:
        assert relative_error(now[name], golden.outputs[name]) < TOLERANCE


def test_what_is_exported_is_a_qwen3_5_again(golden: Golden, model, tmp_path) -> None:
    save_unified(model, tmp_path, kv_fp8=False)
    written = tensors_of(tmp_path)
    assert written.keys() == golden.weights.keys()
    for name, tensor in written.items():
        assert torch.allclose(tensor, golden.weights[name], rtol=0, atol=2**-23)  # norms: 1 + w in fp32, and back
    again = JetNemotronForCausalLM.from_pretrained(tmp_path, torch.float32)
    assert again.config == model.config
    assert relative_error(again(golden.input_ids), golden.outputs["logits"]) < TOLERANCE
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if hasattr(transformers, "Qwen3_5ForCausalLM"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
        with torch.no_grad():
            assert relative_error(theirs(golden.input_ids).logits, golden.outputs["logits"]) < TOLERANCE


def multimodal(golden: Golden, directory: Path) -> Path:
    """The same weights as the published checkpoints have them, beside a vision tower and a layer of MTP."""
    text = {k: v for k, v in golden.config.items() if k != "tie_word_embeddings"}
    config = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {**text, "mtp_num_hidden_layers": 1, "mamba_ssm_dtype": "float32"},
        "vision_config": {"model_type": "qwen3_5_vision"},
        "tie_word_embeddings": golden.config["tie_word_embeddings"],
        "image_token_id": 90,
    }
    weights = {k.replace("model.", "model.language_model.", 1): v for k, v in golden.weights.items()}
    weights |= {"model.visual.patch_embed.proj.weight": torch.zeros(2), "model.visual.merger.norm.bias": torch.zeros(2)}
    weights |= {"mtp.fc.weight": torch.zeros(2)}
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_the_text_part_of_the_multimodal_model(golden: Golden, model, tmp_path) -> None:
    directory = multimodal(golden, tmp_path / "in")
    with pytest.warns(JetExportWarning) as warned:
        loaded = JetNemotronForCausalLM.from_pretrained(directory, torch.float32)
    (message,) = [str(w.message) for w in warned]
    assert "the vision tower (2 tensors, model.visual.*)" in message
    assert "the multi-token-prediction layer (1 tensors, mtp.*)" in message
    assert torch.equal(loaded(golden.input_ids), model(golden.input_ids))
    loaded.bfloat16().save_pretrained(tmp_path / "out")  # as the text model
    assert tensors_of(tmp_path / "out").keys() == golden.weights.keys()
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert [written[k] for k in ("model_type", "torch_dtype", "dtype")] == ["qwen3_5_text", "bfloat16", "bfloat16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_5_moe"}, "model_type is 'qwen3_5_moe': a mixture of experts"),
        ({"model_type": "qwen3_next"}, "'qwen3_next': Qwen3-Next, whose projections are laid out otherwise"),
        ({"model_type": "kimi_linear"}, "'kimi_linear': Kimi Linear, whose delta rule decays each channel by itself"),
        ({"model_type": "qwen3_5"}, "text_config, which describes its text model, is missing"),
        (
            {"model_type": "qwen3_5", "text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
            "agree",
        ),
        ({"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]}, r"layer_types\[3\] is 'sliding_attention'"),
        ({"linear_num_value_heads": 5}, "2 key heads beside 5 value heads"),
        ({"linear_key_head_dim": 24}, "head_k_dim of the jet layers is 24"),
        ({"attn_output_gate": False}, "attn_output_gate is False; qwen3_5_text models are run here with True only"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters .*is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.03125}}, "rotary_dim is 1, which is no even part of head_dim"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.25 and 0.5"),
        ({"num_hidden_layers": 2**40, "layer_types": None}, "num_hidden_layers is 1,099,511,627,776"),
    ],
)
def test_what_is_not_run_is_refused_by_name(golden: Golden, change: dict[str, Any], message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        JetNemotronConfig.from_dict({**golden.config, **change})


def test_layers_by_interval_and_defaults_of_transformers(golden: Golden) -> None:
    """config.json may leave out what Qwen3_5TextConfig has a default for."""
    own = ("layer_types", "head_dim", "rope_parameters")
    short = {k: v for k, v in golden.config.items() if k not in own and not k.startswith("linear_")}
    c = JetNemotronConfig.from_dict({**short, "num_hidden_layers": 8, "full_attention_interval": 2})
    assert c.layer_types == ("jet", "attn") * 4
    assert (c.head_dim, c.rope_dim, c.jet_num_heads, c.key_heads) == (256, 64, 32, 16)
    assert (c.head_k_dim, c.head_v_dim, c.conv_size) == (128, 128, 4)


def test_norms_and_decays_stay_fp32_in_bf16(golden: Golden) -> None:
    """1 + w is computed in fp32 there; a bf16 weight of 1 + w would have lost w's last bits."""
    c = JetNemotronConfig.from_dict(golden.config)
    kept = {n for n, p in random_model(c, torch.bfloat16).named_parameters() if p.dtype == torch.float32}
    assert {"norm.weight", "layers.3.self_attn.q_norm.weight", "layers.0.self_attn.A_log"} <= kept
    assert not any("proj" in name or "o_norm" in name or "conv1d" in name for name in kept)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.8b", 0.752), ("2b", 1.882), ("4b", 4.206), ("9b", 8.954), ("27b", 26.896)],
)
def test_presets_have_the_published_sizes(name: str, billions: float) -> None:
    """Of the text model: what the names round, less the vision tower and the multi-token-prediction layer."""
    assert parameter_count(load_config(f"qwen3.5-{name}")) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_a_preset_is_what_its_config_json_says() -> None:
    """The 27B's, as published; its text_config leaves nothing to defaults."""
    text = {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "bos_token_id": None,
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 24,
        "num_hidden_layers": 64,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "vocab_size": 248320,
    }
    config = {"model_type": "qwen3_5", "tie_word_embeddings": False, "text_config": text, "vision_config": {}}
    assert JetNemotronConfig.from_dict(config) == load_config("qwen3.5-27b")
    assert unknown_keys(text) == []


def test_fp8_blocks_are_read(golden: Golden, tmp_path) -> None:
    """As Qwen publishes them: every projection in FP8 with a scale for each block, the last ones narrower."""
    block, stored, wide = (48, 40), {}, {}
    for name, weight in golden.weights.items():
        stored[name] = wide[name] = weight
        if weight.dim() == 2 and "embed" not in name and "in_proj_a" not in name and "in_proj_b" not in name:
            stored[name], stored[f"{name}_scale_inv"], wide[name] = in_blocks(weight, block)
    quant = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    config = {**golden.config, "quantization_config": quant}
    want = Golden(golden.config, [], wide, golden.outputs).model(tmp_path / "wide")
    got = Golden(config, [], stored, golden.outputs).model(tmp_path / "blocks")
    assert len(stored) > len(wide)
    for (name, a), (_, b) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    stored["model.layers.0.linear_attn.out_proj.weight_scale_inv"] = torch.ones(1, 1)
    with pytest.raises(JetExportError, match=r"out_proj.weight_scale_inv has shape \[1, 1\], blocks of \[48, 40\]"):
        Golden(config, [], stored, golden.outputs).model(tmp_path / "wrong")
    for change, message in (({"weight_block_size": None}, "weight_block_size None"), ({"fmt": "e5m2"}, "fmt 'e5m2'")):
        with pytest.raises(JetExportError, match=message):
            other = {**config, "quantization_config": {**quant, **change}}
            Golden(other, [], stored, golden.outputs).model(tmp_path / "other")


def test_what_a_build_does_not_take(golden: Golden, tmp_path) -> None:
    directory = golden.save_checkpoint(tmp_path)
    with pytest.raises(JetExportError, match="--fp8"):
        make_plan(BuildOptions(model=str(directory), device="cpu", fp8=True, dtype="float32"))


def test_what_other_tools_do_not_take(golden: Golden, tmp_path) -> None:
    model = str(golden.save_checkpoint(tmp_path))
    options = BuildOptions(model=model, device="cpu", dtype="float32", output=tmp_path / "out")
    with pytest.raises(JetExportError, match=r"--target trtllm-1\.2: not for qwen3_5_text models"):
        run_export(options, "trtllm-1.2")
    assert not (tmp_path / "out").exists()


def test_an_fp8_model_is_written_and_read_back(golden: Golden, tmp_path) -> None:
    """q_proj alternates queries and gates in FP8 too: codes, scales and logits are those that were written."""
    model = golden.model(tmp_path / "in")
    for path in ("layers.0.self_attn.in_proj", "layers.3.self_attn.qkv_proj", "layers.3.self_attn.o_proj"):
        linear = model.get_submodule(path)
        assert isinstance(linear, torch.nn.Linear)
        model.set_submodule(path, Fp8Linear.from_linear(linear, float(linear.weight.abs().max()) / 448, 0.01))
    (tmp_path / "out").mkdir()
    save_unified(model, tmp_path / "out", kv_fp8=False)
    written = tensors_of(tmp_path / "out")
    assert written["model.layers.3.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    again = JetNemotronForCausalLM.from_pretrained(tmp_path / "out", torch.float32)
    assert torch.equal(again(golden.input_ids), model(golden.input_ids))
