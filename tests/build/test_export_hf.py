"""export-hf writes modelopt's unified format, which is read back to the same logits, bit for bit."""

import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fp8_models import CALIBRATION, CONFIG, TEXT, model_of
from helpers.golden import tensors_of
from helpers.paths import with_helpers
from torch import Tensor, nn

from jet_export.build.export_hf import check_output, run_export, save_unified
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.build.steps import load_model, quantize_model
from jet_export.model import weights
from jet_export.model.fp8 import FP8, Fp8Linear
from jet_export.model.fp8_checkpoint import kv_scale_names
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.model.weights import checkpoint_layout
from jet_export.quantization.calibrate import calibrate_kv_scales, quiet
from jet_export.quantization.quantize import QuantizationReport, apply_report, quantize_fp8
from jet_export.utils.errors import JetExportError
from jet_export.utils.progress import Progress


@pytest.fixture(scope="module")
def fp8_model() -> JetNemotronForCausalLM:
    """Every layer kind, calibrated by modelopt, with the scales of an FP8 KV cache."""
    model = model_of()
    quantize_fp8(model, CALIBRATION)
    calibrate_kv_scales(model, CALIBRATION)
    return model


@pytest.fixture
def written(fp8_model, tmp_path) -> Path:
    save_unified(fp8_model, tmp_path, kv_fp8=True)
    return tmp_path


def logits(model: JetNemotronForCausalLM, kv_dtype: torch.dtype) -> Tensor:
    """Prefill, a chunk and a decode step of two sequences."""
    ids = torch.randint(0, model.config.vocab_size, (2, 41), generator=torch.Generator().manual_seed(3))
    cache = model.new_cache(2, 64, kv_dtype=kv_dtype)
    return torch.cat([model(part, cache=cache) for part in ids.split([33, 7, 1], 1)], 1)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
def test_from_pretrained_gives_the_same_logits(fp8_model, written, kv_dtype) -> None:
    again = JetNemotronForCausalLM.from_pretrained(written, max_positions=256)
    assert torch.equal(logits(again, kv_dtype), logits(fp8_model, kv_dtype))
    assert [type(m) for m in again.modules()] == [type(m) for m in fp8_model.modules()]


def test_scales_reach_the_logits(fp8_model, written) -> None:
    """The test above can fail: each kind of scale matters."""
    reference = logits(fp8_model, FP8)
    for change in ("in_proj.weight_scale", "in_proj.input_scale", "k_scale", "v_scale"):
        again = JetNemotronForCausalLM.from_pretrained(written, max_positions=256)
        attn: Any = again.layers[1 if change in ("k_scale", "v_scale") else 0].self_attn
        if change in ("k_scale", "v_scale"):
            setattr(attn, change, getattr(attn, change) * 1.5)
        else:
            getattr(attn.in_proj, change.split(".")[1]).mul_(1.5)
        assert not torch.equal(logits(again, FP8), reference), change


def test_published_names_shapes_and_dtypes(fp8_model, written) -> None:
    stored, layout = tensors_of(written), checkpoint_layout(CONFIG)
    fp8 = {n for n, s in layout.items() if isinstance(_parent(fp8_model, s.param), Fp8Linear) and n.endswith("weight")}
    scales = {f"{n}_scale" for n in fp8} | {n.removesuffix("weight") + "input_scale" for n in fp8}
    assert stored.keys() == layout.keys() | scales | kv_scale_names(CONFIG).keys()
    for name, tensor in stored.items():
        if name.endswith("_scale"):
            assert (tensor.dtype, tensor.shape) == (torch.float32, ())
            assert tensor > 0
        else:
            assert tuple(tensor.shape) == layout[name].shape
            assert (tensor.dtype == FP8) == (name in fp8), name
    assert {n.split(".")[-2] for n in kv_scale_names(CONFIG)} == {"k_proj", "v_proj"}
    assert f"{sum(k != 'jet' for k in CONFIG.layer_types)}" == f"{len(kv_scale_names(CONFIG)) // 2}"


def _parent(model: nn.Module, param: str) -> nn.Module:
    return model.get_submodule(param.rpartition(".")[0])


def test_kv_scales_are_those_of_the_cache(fp8_model, written) -> None:
    stored = tensors_of(written)
    for name, (i, attr) in kv_scale_names(CONFIG).items():
        assert stored[name].item() == pytest.approx(getattr(fp8_model.layers[i].self_attn, attr), rel=1e-7)
        assert stored[name].item() != 1.0


def published_skeleton(model: JetNemotronForCausalLM, attribute: str) -> nn.Module:
    """Modules named as the published tensors, linear layers holding `attribute` of the fused ones, sliced."""
    root = nn.Module()
    for name, s in checkpoint_layout(model.config).items():
        *path, leaf = name.split(".")
        parent: Any = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        tensor = model.get_parameter(s.param)[s.start : s.start + s.shape[0]]
        if leaf == "weight" and tensor.dim() == 2 and "embed" not in name:
            holder = root.get_submodule(".".join(path[:-1])) if path[:-1] else root
            linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, dtype=tensor.dtype)
            linear.weight = nn.Parameter(tensor.detach().clone(), requires_grad=False)
            setattr(holder, path[-1], linear)
        elif leaf == "bias":
            parent.bias = nn.Parameter(tensor.detach().clone(), requires_grad=False)
        else:
            setattr(parent, leaf, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    return root


@pytest.fixture(scope="module")
def modelopts_own(fp8_model) -> tuple[dict[str, Tensor], dict]:
    """(tensors, hf_quant_config.json) that modelopt's exporter makes of the same model in the published layout, its
    quantizers holding our scales. The exporter's driver needs transformers, so its parts are called here."""
    with quiet():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export.quant_utils import get_quant_config, postprocess_state_dict
        from modelopt.torch.export.unified_export_hf import _export_quantized_weight
        from modelopt.torch.quantization.nn import TensorQuantizer

        from jet_export.quantization.calibrate import modelopt_config

        model, layout = model_of(), checkpoint_layout(CONFIG)  # the same weights, before they were quantised
        skeleton: Any = published_skeleton(model, "weight")
        skeleton.lm_head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False)  # tied: not in the layout
        layers = {n.removesuffix(".weight"): _parent(fp8_model, s.param) for n, s in layout.items() if "weight" in n}
        fp8 = {name: m for name, m in layers.items() if isinstance(m, Fp8Linear)}
        mtq.quantize(skeleton, modelopt_config(mtq, list(fp8)), lambda m: None)
        for name, ours in fp8.items():
            linear = skeleton.get_submodule(name)
            linear.weight_quantizer.amax = ours.weight_scale[0] * 448
            linear.input_quantizer.amax = ours.input_scale[0] * 448
        for i, kind in enumerate(CONFIG.layer_types):
            if kind != "jet":
                attn = skeleton.get_submodule(f"model.layers.{i}.self_attn")
                for what in "kv":
                    quantizer = TensorQuantizer(mtq.config.QuantizerAttributeConfig(num_bits=(4, 3)))
                    scale = getattr(fp8_model.layers[i].self_attn, f"{what}_scale")
                    quantizer.amax = torch.tensor(scale * 448)
                    attn.add_module(f"{what}_bmm_quantizer", quantizer)
        config = get_quant_config(skeleton)
        for name in fp8:
            _export_quantized_weight(skeleton.get_submodule(name), torch.bfloat16)
        del skeleton.lm_head
        return postprocess_state_dict(skeleton.state_dict(), 448.0, "FP8"), config


def test_tensors_are_those_that_modelopt_writes(modelopts_own, written) -> None:
    theirs, ours = modelopts_own[0], tensors_of(written)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        close: dict[str, Any] = (
            {"rtol": 1e-6, "atol": 0} if tensor.dtype == torch.float32 else {"rtol": 0.125, "atol": 2**-9}
        )
        torch.testing.assert_close(ours[name].float(), tensor.float(), **close)


def test_configs_are_those_that_modelopt_writes(modelopts_own, written) -> None:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    theirs, ours = modelopts_own[1], json.loads((written / "hf_quant_config.json").read_text())
    assert ours["producer"] == theirs["producer"]
    a, b = ours["quantization"], theirs["quantization"]
    assert a.pop("exclude_modules") and a.keys() == b.keys() - {"exclude_modules"}
    assert {k: b[k] for k in a} == a
    linears = [n.removesuffix(".weight") for n in checkpoint_layout(CONFIG) if n.endswith("weight")] + ["lm_head"]
    ours = json.loads((written / "hf_quant_config.json").read_text())
    for name in linears:
        if "norm" not in name and "embed" not in name:
            excluded = [
                any(fnmatchcase(name, pattern) for pattern in q["quantization"]["exclude_modules"])
                for q in (ours, theirs)
            ]
            assert excluded[0] == excluded[1], name
    config = json.loads((written / "config.json").read_text())
    assert config["quantization_config"] == convert_hf_quant_config_format(ours)


def test_modelopts_reader_of_fp8_weights(fp8_model, written) -> None:
    """from_quantized_weight, the one function of modelopt 0.47 that reads such tensors outside an engine."""
    from modelopt.torch.export.quant_utils import from_quantized_weight

    stored, layout = tensors_of(written), checkpoint_layout(CONFIG)
    read = 0
    for name, tensor in stored.items():
        if tensor.dtype == FP8:
            s = layout[name]
            ours: Any = _parent(fp8_model, s.param)
            expected = ours.weight[s.start : s.start + s.shape[0]].float() * ours.weight_scale
            assert torch.equal(from_quantized_weight(tensor, stored[f"{name}_scale"], "fp8", torch.float32), expected)
            read += 1
    assert read == sum(n.endswith(".weight_scale") for n in stored)


def test_modelopts_deployment_reader() -> None:
    """modelopt.deploy.llm.LLM, its only loader of whole checkpoints, is TensorRT-LLM's."""
    pytest.importorskip("tensorrt_llm", reason="modelopt's loader of whole checkpoints needs tensorrt_llm and a GPU")
    pytest.skip("needs a GPU: see docs/backends/tensorrt-llm.md for the commands")


def test_shards_with_an_index(fp8_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
    save_unified(fp8_model, tmp_path, kv_fp8=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == tensors_of(tmp_path).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path).values())
    again = JetNemotronForCausalLM.from_pretrained(tmp_path, max_positions=256)
    assert torch.equal(logits(again, FP8), logits(fp8_model, FP8))


def test_lm_head_in_fp8_is_no_longer_tied(tmp_path) -> None:
    model = model_of()
    quantize_fp8(model, CALIBRATION, keep=["model.layers.1"], lm_head=True)
    quant = save_unified(model, tmp_path, kv_fp8=False)
    assert quant is not None
    excluded = quant["quantization"]["exclude_modules"]
    assert "lm_head" not in excluded
    assert {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"} <= set(excluded)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "kv_cache_scheme" not in config["quantization_config"]
    again = JetNemotronForCausalLM.from_pretrained(tmp_path, max_positions=256)
    assert torch.equal(logits(again, torch.bfloat16), logits(model, torch.bfloat16))


def test_nothing_fp8_writes_no_quantisation(tmp_path) -> None:
    model = model_of()
    assert save_unified(model, tmp_path, kv_fp8=False) is None
    assert not (tmp_path / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # safetensors' own is 0600
    again = JetNemotronForCausalLM.from_pretrained(tmp_path, max_positions=256)
    assert torch.equal(logits(again, torch.bfloat16), logits(model, torch.bfloat16))


EXPORT = """
import sys, torch
from pathlib import Path
from helpers.private_memory import PeakGrowth
from jet_export.build.export_hf import save_unified
from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, empty_model
from jet_export.model import weights

config = JetNemotronConfig.from_json_file(sys.argv[1])
model = empty_model(config, torch.float32, torch.device("cpu"))
for p in model.parameters():
    p.data.fill_(0.5)
weights.SHARD_BYTES = 100_000_000
with PeakGrowth() as memory:
    save_unified(model, Path(sys.argv[2]), kv_fp8=False)
print(memory.before, memory.grown)
"""


def test_writing_needs_no_copy_of_the_model(tmp_path) -> None:
    """A 300 MB model in three shards: private memory grows by less than 30 MB."""
    values = {**CONFIG.to_dict(), "hidden_size": 512, "intermediate_size": 4096, "vocab_size": 512}
    values |= {"layer_types": ["jet", "attn"] * 6, "num_hidden_layers": 12}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "out").mkdir()
    args = [sys.executable, "-c", EXPORT, str(tmp_path / "config.json"), str(tmp_path / "out")]
    done = subprocess.run(args, env=with_helpers(), capture_output=True, text=True, check=True)
    held, grown = map(int, done.stdout.split())
    assert held > 250e6
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) > 250e6
    assert grown < 30e6


def export_options(tmp_path: Path, **changes) -> BuildOptions:
    values = {"model": "jet-tiny", "backend": "onnx", "device": "cpu", "output": tmp_path / "out/checkpoint"}
    return BuildOptions(**{**values, **changes})


def test_jet_tiny_and_a_build_from_the_export(tmp_path) -> None:
    """The command on trained weights, with modelopt; a build from its output compiles the same FP8 model."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run_export(export_options(tmp_path, fp8=True, kv_cache_dtype="fp8", calibration=text), emit=lambda line: None)
    out = tmp_path / "out/checkpoint"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["checkpoint"]
    names = {p.name for p in out.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "configuration_jet_nemotron.py",
        "hf_quant_config.json",
        "model.safetensors",
        "tokenizer",
        "tokenizer.json",
        "tokenizer_config.json",
    }

    plan = make_plan(BuildOptions(model=str(out), device="cpu", kv_cache_dtype="fp8", max_seq_len=256))
    assert plan.fp8 and plan.output.name == "checkpoint-fp8-inductor"
    (tmp_path / "bundle").mkdir()
    model = load_model(plan)
    lines: list[str] = []
    report = quantize_model(plan, model, tmp_path / "bundle", Progress(lines.append))
    assert lines == ["    the checkpoint is FP8: 33 projections as they are"]
    assert report is not None and len(report["kv_scales"]) == 2 and min(map(min, report["kv_scales"].values())) > 0

    tiny = JetNemotronForCausalLM.from_pretrained("jet-tiny")  # calibrated beyond 256 positions
    quantise_like(tiny, text)
    assert torch.equal(logits(model, FP8), logits(tiny, FP8))
    bundle = random_model(plan.config, torch.bfloat16, max_positions=256)
    apply_report(bundle, QuantizationReport.from_dict(report))
    bundle.load_state_dict(model.state_dict())
    assert torch.equal(logits(bundle, FP8), logits(model, FP8))


def quantise_like(model: JetNemotronForCausalLM, text: Path) -> None:
    from jet_export.model.hub import JET_TINY_DIR
    from jet_export.quantization.calibrate import calibration_tokens
    from jet_export.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(JET_TINY_DIR / "tokenizer.json")
    batches = calibration_tokens(tokenizer, text.read_text(), vocab_size=model.config.vocab_size)
    quantize_fp8(model, batches)
    calibrate_kv_scales(model, batches)


def test_an_output_that_exists(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(JetExportError, match=r"--output .*: exists and is not a checkpoint\.\nChoose another place"):
        check_output(tmp_path, force=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JetExportError, match=r"holds a checkpoint\.\nPass --force to replace it"):
        check_output(tmp_path, force=False)
    check_output(tmp_path, force=True)
    check_output(tmp_path / "new", force=False)


def test_failure_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        run_export(export_options(tmp_path), emit=lambda line: None)
    assert list((tmp_path / "out").iterdir()) == []


def change(directory: Path, edit) -> Path:
    """Rewrite the checkpoint's tensors after `edit(tensors)`."""
    from safetensors.torch import save_file

    tensors = tensors_of(directory)
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing, though {Q}.input_scale is there"),
        (lambda t: t.update({f"{Q}.input_scale": torch.tensor(2.0)}), f"{Q}.input_scale is 2 and .*k_proj.input_scale"),
        (lambda t: t.update({f"{Q}.input_scale": torch.tensor(-1.0)}), f"{Q}.input_scale is -1.*\nOnly one positive"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.ones(3)}), f"{Q}.weight_scale has shape \\[3\\]"),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), "weight is float32, and its scales are"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.endswith("put_scale") or n.endswith("ight_scale")],
            "weight is float8_e4m3fn, and its scales are not",
        ),
    ],
)
def test_damaged_scales_are_named(written, edit, message: str) -> None:
    change(written, edit)
    with pytest.raises(JetExportError, match=message):
        JetNemotronForCausalLM.from_pretrained(written)


def test_other_quantisation_is_refused(written) -> None:
    config = json.loads((written / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "NVFP4"
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(JetExportError, match="quantization_config: quant_algo is NVFP4"):
        JetNemotronForCausalLM.from_pretrained(written)


def test_fp8_checkpoint_is_not_quantised_again(written, tmp_path) -> None:
    plan = make_plan(BuildOptions(model=str(written), device="cpu", backend="onnx", fp8=True, keep=("model.layers.1",)))
    with pytest.raises(JetExportError, match=r"--keep model.layers.1: the checkpoint is FP8 already"):
        quantize_model(plan, load_model(plan), tmp_path, Progress(lambda line: None))
    with pytest.raises(JetExportError, match="an FP8 checkpoint makes a bfloat16 model"):
        make_plan(BuildOptions(model=str(written), device="cpu", dtype="float32"))
