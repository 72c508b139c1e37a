"""The out-of-tree model on stand-ins for TensorRT-LLM, against our own model's logits. No claim beyond that."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.fake_models import MODELS
from helpers.fake_trtllm import load_model, tensorrt_llm
from helpers.fp8_models import CONFIG, model_of, to_fp8
from torch import Tensor

from jet_export.build.export_hf import save_unified
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.utils.errors import JetExportError

LINES = [("1.2.1", "old"), ("1.3.0rc15", "old"), ("1.3.0rc29", "moved")]
TOL = 1e-5  # fp32: sums in another order


def ids(n: int, seed: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def whole(model: JetNemotronForCausalLM, tokens: Tensor) -> Tensor:
    return model(tokens[None])[0]


@pytest.fixture
def fp32(tmp_path):
    model = model_of(torch.float32)
    save_unified(model, tmp_path, kv_fp8=False)
    return model, tmp_path


def run_batches(executor, prompts: dict[int, Tensor]) -> dict[int, list[Tensor]]:
    """Prefill of two, a chunk of one beside decode of the other and a new request, then decode of all three."""
    out: dict[int, list[Tensor]] = {r: [] for r in prompts}
    at = dict.fromkeys(prompts, 0)

    def step(contexts: dict[int, int], generations: list[int]) -> None:
        take = {r: prompts[r][at[r] : at[r] + n] for r, n in {**contexts, **dict.fromkeys(generations, 1)}.items()}
        logits = executor.step({r: take[r] for r in contexts}, {r: take[r] for r in generations})
        for r, x in logits.items():
            out[r].append(x)
            at[r] += len(x)

    step({7: 33, 2: 5}, [])
    step({2: 30, 9: 3}, [7])
    for _ in range(4):
        step({}, [9, 7, 2])
    return out


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("version", "attention"), LINES)
def test_logits_are_our_models(fp32, version: str, attention: str, strided: bool) -> None:
    model, directory = fp32
    prompts = {7: ids(38, 1), 2: ids(39, 2), 9: ids(7, 3)}
    with tensorrt_llm(version, attention):
        _, executor = load_model(directory, strided=strided, version=version)
        out = run_batches(executor, prompts)
    for r, parts in out.items():
        logits = torch.cat(parts)
        assert len(logits) == len(prompts[r]) > CONFIG.window_size * (r != 9)
        assert relative_error(logits, whole(model, prompts[r])) < TOL


def test_a_freed_slot_starts_from_zero(fp32) -> None:
    model, directory = fp32
    with tensorrt_llm():
        _, executor = load_model(directory, slots=1)
        executor.step({1: ids(9, 1)}, {})
        executor.free(1)
        logits = executor.step({2: ids(5, 2)}, {})[2]
    assert relative_error(logits, whole(model, ids(5, 2))) < TOL


def test_fp8_checkpoint(tmp_path) -> None:
    """Quantised projections by the quant config; a layer left in bf16 is excluded with its fused parts."""
    model, kept = model_of(), model_of().layers[3]
    to_fp8(model, ids(64, 5)[None])
    for path in ("self_attn.in_proj", "self_attn.w2", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        model.layers[3].set_submodule(path, kept.get_submodule(path))
    save_unified(model, tmp_path, kv_fp8=False)
    with tensorrt_llm():
        theirs, executor = load_model(tmp_path)
        logits = executor.step({1: ids(40, 6)}, {})[1]
        dtypes = {n: p.dtype for n, p in theirs.named_parameters() if n.endswith(("_proj.weight", "w2.weight"))}
    for name, dtype in dtypes.items():
        fp8 = "layers.3." not in name and "ba_proj" not in name
        assert (dtype == torch.float8_e4m3fn) == fp8, name
    assert relative_error(logits, whole(model, ids(40, 6))) < 1e-2  # bf16 roundings in another order


def test_jet_tiny(tmp_path) -> None:
    """The trained model in FP8, as `jet-export export-hf` writes it: the same most likely tokens."""
    model = JetNemotronForCausalLM.from_pretrained("jet-tiny")
    tokens = torch.randint(0, 4096, (150,), generator=torch.Generator().manual_seed(4))
    to_fp8(model, tokens[None])
    save_unified(model, tmp_path, kv_fp8=False)
    with tensorrt_llm():
        _, executor = load_model(tmp_path)
        parts = [executor.step({1: tokens[:140]}, {})[1]]
        parts += [executor.step({}, {1: t[None]})[1] for t in tokens[140:]]
    ours = whole(model, tokens)
    assert relative_error(torch.cat(parts), ours) < 5e-2
    assert (torch.cat(parts).argmax(-1) == ours.argmax(-1)).float().mean() > 0.9


FAULTS = {
    "slots of another sequence": ("states", "state_slots", lambda f: lambda m, line: f(m, line).flip(0)),
    "state never carried": (
        "states",
        "step_of",
        lambda f: lambda m, line: f(m, line)._replace(context_lens=torch.zeros_like(f(m, line).context_lens)),
    ),
    "decode form for prompts": ("states", "step_of", lambda f: lambda m, line: f(m, line)._replace(decode=True)),
    "window not passed": ("modeling", "JetAttention.window", None),
    "gathered states not written back": ("modeling", "write_back", lambda f: lambda *a: None),
    "fused rows in another order": ("fuse", "_join", lambda f: lambda t: f(t[::-1])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_are_detected(fp32, monkeypatch, fault: str) -> None:
    """Each fault makes the comparison above fail, or the stand-ins refuse it."""
    model, directory = fp32
    module, name, wrap = FAULTS[fault]
    prompts = {7: ids(38, 1), 2: ids(39, 2), 9: ids(7, 3)}
    with tensorrt_llm() as modeling:
        import sys

        target = sys.modules[f"jet_export.trtllm.{module}"]
        if wrap is None:
            monkeypatch.setattr(
                modeling.JetAttention, "window", property(lambda s: None, lambda s, v: None), raising=False
            )
        else:
            changed = wrap(getattr(target, name))
            monkeypatch.setattr(target, name, changed)
            if name in vars(modeling):
                monkeypatch.setattr(modeling, name, changed)
        try:
            _, executor = load_model(directory, strided=fault.startswith("gathered"))
            out = run_batches(executor, prompts)
        except (ValueError, RuntimeError, AssertionError):
            return
    errors = {r: relative_error(torch.cat(parts), whole(model, prompts[r])) for r, parts in out.items()}
    assert not max(errors.values()) < 100 * TOL, errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_dtype": torch.bfloat16}, "recurrent state would be torch.bfloat16; it needs float32"),
        ({"spec_config": object()}, "speculative decoding is not supported"),
        ({"lora_config": object()}, "LoRA is not supported"),
    ],
)
def test_unsupported_options_are_refused(fp32, changes: dict, message: str) -> None:
    with tensorrt_llm(), pytest.raises(JetExportError, match=message):
        load_model(fp32[1], **changes)


def test_tensor_parallel_is_refused(fp32) -> None:
    from helpers.fake_layers import Mapping

    with tensorrt_llm(), pytest.raises(JetExportError, match="runs on one GPU; tp_size is 2"):
        load_model(fp32[1], mapping=Mapping(tp_size=2))


def test_other_quantisation_is_refused(fp32) -> None:
    quant: dict[str, Any] = {
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "exclude_modules": []}
    }
    (fp32[1] / "hf_quant_config.json").write_text(json.dumps(quant))
    with tensorrt_llm(), pytest.raises(JetExportError, match="quant_algo NVFP4 is not supported"):
        load_model(fp32[1])


@pytest.mark.parametrize("version", ["1.4.0rc1", "0.21.0", "2.0"])
def test_unknown_version_is_one_message(version: str, monkeypatch) -> None:
    known = r"tensorrt_llm .* is not known here.*\nKnown: 1\.2\.\*, 1\.3\.\*\. To try it"
    with pytest.raises(JetExportError, match=known), tensorrt_llm(version):
        pass
    monkeypatch.setenv("JET_EXPORT_TRTLLM_ANY_VERSION", "1")
    with tensorrt_llm(version):
        assert "JetNemotronForCausalLM" in MODELS


def test_a_1_3_without_mamba_metadata_is_refused(fp32) -> None:
    with tensorrt_llm("1.3.0rc1"), pytest.raises(JetExportError, match="mamba_metadata is not there"):
        _, executor = load_model(fp32[1], version="1.2.1")  # a manager that fills no mamba_metadata
        executor.step({1: ids(3, 1)}, {})


def test_fp8_lm_head_is_refused(tmp_path) -> None:
    model = model_of(tie_word_embeddings=False)
    to_fp8(model, ids(64, 5)[None])
    from jet_export.model.fp8 import Fp8Linear

    model.set_submodule("lm_head", Fp8Linear.from_linear(model.lm_head, 0.01, 0.01))
    save_unified(model, tmp_path, kv_fp8=False)
    with tensorrt_llm(), pytest.raises(JetExportError, match=r"lm_head is FP8.*\nExport without --fp8-lm-head"):
        load_model(tmp_path)


def test_config_sizes_the_states(fp32) -> None:
    with tensorrt_llm():
        model, executor = load_model(fp32[1])
        c = model.config
        assert c.hybrid_override_pattern == "M**M"
        assert executor.manager.ssm[0].shape[1:] == (2, CONFIG.head_v_dim, 32)
        assert executor.manager.conv[3].shape[1:] == (CONFIG.jet_value_dim, 3)
        assert type(c)().jet_nemotron == {}  # transformers makes an empty one


def test_config_loader(fp32, tmp_path) -> None:
    with tensorrt_llm():
        from helpers.fake_models import CONFIG_LOADERS

        config = CONFIG_LOADERS["jet_nemotron"]().load(str(fp32[1]))
        assert config.pretrained_config.num_hidden_layers == 4
        from transformers import AutoConfig, PretrainedConfig

        class Other(PretrainedConfig):
            model_type = "other"

        AutoConfig.register("other", Other)
        (tmp_path / "other").mkdir()
        (tmp_path / "other/config.json").write_text('{"model_type": "other"}')
        with pytest.raises(JetExportError, match="not a Jet-Nemotron checkpoint"):
            CONFIG_LOADERS["jet_nemotron"]().load(str(tmp_path / "other"))


def test_differing_scales_and_missing_tensors() -> None:
    from jet_export.trtllm.fuse import fuse_weights

    model = model_of(torch.float32)
    from jet_export.model.weights import published_tensors

    weights = published_tensors(model)
    q = "model.layers.0.self_attn.q_proj"
    with pytest.raises(JetExportError, match=f"{q}.weight is missing"):
        fuse_weights({k: v for k, v in weights.items() if k != f"{q}.weight"}, CONFIG)
    with pytest.raises(JetExportError, match=r"k_proj.weight: weight_scale is not that of .*q_proj.weight"):
        fuse_weights({**weights, f"{q}.weight_scale": torch.tensor(1.0)}, CONFIG)


def test_partly_excluded_projection() -> None:
    from jet_export.trtllm.adapt import excluded_modules

    assert excluded_modules(CONFIG, None) is None
    whole_layer = excluded_modules(replace(CONFIG), ["model.layers.0.*"])
    assert whole_layer is not None and "model.layers.0.self_attn.in_proj" in whole_layer
    with pytest.raises(JetExportError, match=r"leaves out model.layers.0.self_attn.q_proj and not .*k_proj"):
        excluded_modules(CONFIG, ["model.layers.0.self_attn.q_proj"])
