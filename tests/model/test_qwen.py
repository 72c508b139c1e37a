"""Qwen2(.5) and Qwen3 directories, against what transformers made of the same small random checkpoints."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.golden import Golden, tensors_of
from helpers.qwen import KINDS, load_qwen, outputs

from jet_export.backends.eager import EagerEngine
from jet_export.build.export_hf import save_unified
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.limits import Limits
from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.presets import qwen3_1_7b
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

TOLERANCE = 2e-5  # fp32


@pytest.fixture(params=KINDS)
def golden(request) -> Golden:
    return load_qwen(request.param)


def test_logits_and_greedy_tokens_are_those_of_transformers(golden: Golden, tmp_path, recwarn) -> None:
    """Tokens by the runtime over an eager engine, in chunks of 4 and decode steps."""
    model = golden.model(tmp_path)
    assert not recwarn.list
    assert set(model.config.layer_types) == {"attn"}
    assert relative_error(model(golden.input_ids), golden.outputs["logits"]) < TOLERANCE
    engine = EagerEngine(model, Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=4))
    llm = LLM.over(engine, ByteTokenizer(), model.config.eos_token_id)
    prompt, greedy = golden.outputs["prompt"].tolist(), golden.outputs["greedy"].tolist()
    (made,) = llm.generate([prompt], max_new_tokens=len(greedy))
    assert made.token_ids == greedy


def test_the_outputs_are_those_of_the_transformers_that_is_installed(golden: Golden, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rope = golden.config.get("rope_parameters", {})  # which 4.57 would not see
    golden.config = {"rope_theta": rope.get("rope_theta"), **golden.config}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(golden.save_checkpoint(tmp_path)).float().eval()
    now = outputs(theirs, golden.input_ids, golden.outputs["prompt"], len(golden.outputs["greedy"]))
    assert relative_error(now["logits"], golden.outputs["logits"]) < 1e-5
    assert torch.equal(now["greedy"], golden.outputs["greedy"])


def test_what_is_exported_is_a_qwen_directory_again(golden: Golden, tmp_path) -> None:
    model = golden.model(tmp_path / "in")
    (tmp_path / "out").mkdir()
    save_unified(model, tmp_path / "out", kv_fp8=False)
    assert tensors_of(tmp_path / "out").keys() == golden.weights.keys()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {k: config[k] for k in ("model_type", "architectures")} == {
        k: golden.config[k] for k in ("model_type", "architectures")
    }
    assert not {"auto_map", "efficient_attention_config"} & config.keys()
    again = JetNemotronForCausalLM.from_pretrained(tmp_path / "out", torch.float32)
    assert again.config == model.config
    assert torch.equal(again(golden.input_ids), model(golden.input_ids))


def test_transformers_reads_the_export(golden: Golden, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    golden.model(tmp_path / "in").save_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval()
    with torch.no_grad():
        assert relative_error(theirs(golden.input_ids).logits, golden.outputs["logits"]) < 1e-5


def test_a_plan_of_a_directory(golden: Golden, tmp_path) -> None:
    directory = golden.save_checkpoint(tmp_path / "ckpt")
    plan = make_plan(BuildOptions(model=str(directory), device="cpu", dtype="float32"))
    assert plan.limits.max_seq_len == 256
    assert plan.config.model_type == golden.config["model_type"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is True; qwen. models are run here with False only"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types\[1\] is 'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers is 2, and layer_types names 1 layers"),
        ({"num_hidden_layers": 10_000, "layer_types": None}, "num_hidden_layers is 10000, more than 1024"),
        ({"num_hidden_layers": 2**40, "layer_types": None}, "num_hidden_layers is 1,099,511,627,776"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling .*is not supported"),
        ({"head_dim": 272}, "head_dim of the attention layers is 272"),
        ({"model_type": "qwen3_moe"}, r"model_type is 'qwen3_moe'.*\n.*qwen2, qwen3"),
    ],
)
def test_variants_that_are_not_run_are_refused(golden: Golden, change: dict[str, Any], message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        JetNemotronConfig.from_dict({**golden.config, **change})


def test_attention_bias_is_the_kinds() -> None:
    qwen2, qwen3 = (load_qwen(kind).config for kind in KINDS)
    for config, bias in ((qwen2, False), (qwen3, True)):
        with pytest.raises(JetExportError, match=f"attention_bias is {bias}"):
            JetNemotronConfig.from_dict({**config, "attention_bias": bias})


def test_the_baseline_is_a_qwen3() -> None:
    """The published config.json's keys that say its sizes."""
    published = {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }
    assert JetNemotronConfig.from_dict(published) == qwen3_1_7b()
    assert dataclasses.replace(qwen3_1_7b(), raw=published).to_dict().items() >= published.items()
