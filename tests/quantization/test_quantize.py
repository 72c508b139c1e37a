"""FP8 models: modelopt's calibration, which layers are replaced, and the model rebuilt from its report."""

import copy
import gc
import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.fp8_models import CALIBRATION, CONFIG, model_of
from helpers.golden import DATA, load_golden
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jet_export.backends.inductor.package import export_graph
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.model.fp8 import FP8, Fp8Linear, quantize
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, empty_model
from jet_export.quantization.calibrate import calibrate_kv_scales, calibrated_copy
from jet_export.quantization.quantize import (
    QuantizationReport,
    apply_report,
    check_all_fp8,
    layer_table,
    quantize_fp8,
    select,
)
from jet_export.utils.errors import JetExportError


def logits(model: JetNemotronForCausalLM, kv_dtype: torch.dtype | None = None) -> Tensor:
    """Prefill, then three tokens of decode."""
    ids = torch.arange(2 * 40).reshape(2, 40) * 7 % 128
    cache = model.new_cache(2, 43, kv_dtype=kv_dtype)
    out = [model(ids, cache=cache)] + [model(ids[:, t : t + 1], cache=cache) for t in range(3)]
    return torch.cat(out, 1)


@pytest.fixture(scope="module")
def quantised() -> tuple[JetNemotronForCausalLM, QuantizationReport]:
    model = model_of()
    report = quantize_fp8(model, CALIBRATION)
    return model, report


def assert_same_codes(fake: Tensor, codes: Tensor, x: Tensor, scale: Tensor) -> None:
    """modelopt's dequantised values are our codes; where x / scale is a tie up to fp32 rounding, or a neighbour."""
    theirs = (fake.float() / scale).to(FP8).double()  # undoes its cast to the model dtype, which is finer than E4M3
    ours, exact = codes.double(), x.double() / scale.double()
    tie = (exact - (theirs + ours) / 2).abs() <= 2.0**-22 * exact.abs()
    assert ((theirs == ours) | tie).all()


class TestQuantizeFp8:
    def test_large_projections_and_nothing_else(self, quantised) -> None:
        model, report = quantised
        jet = [f"model.layers.{i}.self_attn.{p}" for i in (0, 3) for p in ("in_proj", "w2", "o_proj")]
        attention = [f"model.layers.{i}.self_attn.{p}" for i in (1, 2) for p in ("qkv_proj", "o_proj")]
        mlp = [f"model.layers.{i}.mlp.{p}" for i in range(4) for p in ("gate_up_proj", "down_proj")]
        assert set(report.fp8) == {*jet, *attention, *mlp}
        assert {f"model.{n}" for n, m in model.named_modules() if isinstance(m, Fp8Linear)} == set(report.fp8)
        reasons = dict(report.kept)
        assert reasons["model.layers.0.self_attn.ba_proj"] == "small"
        assert "request" in reasons["lm_head"] and "embedding" in reasons["model.embed_tokens"]
        assert report.calibration_tokens == 3 * 64

    def test_modelopt_leaves_no_trace(self, quantised) -> None:
        model, _ = quantised
        assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "jet_export"}
        assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed_tokens.weight
        assert not [k for k in vars(model) if "modelopt" in k]

    def test_scales_are_amax_over_448(self, quantised) -> None:
        _, report = quantised
        model = model_of()
        amax: dict[str, float] = {}
        for name in report.fp8:

            def hook(m: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                amax[name] = max(amax.get(name, 0.0), float(args[0].abs().max()))

            model.get_submodule(name.removeprefix("model.")).register_forward_pre_hook(hook)
        for ids in CALIBRATION:
            model(ids)
        for name, scales in report.fp8.items():
            weight = model.get_parameter(f"{name.removeprefix('model.')}.weight")
            assert scales["weight_scale"] == torch.tensor(float(weight.abs().max()) / 448).item()
            assert scales["input_scale"] == torch.tensor(amax[name] / 448).item()

    def test_a_fused_projection_has_one_scale(self, quantised) -> None:
        model, report = quantised
        layer = model.layers[0].self_attn.in_proj
        assert layer.weight_scale.shape == layer.input_scale.shape == (1,)
        assert layer.weight_scale.item() == report.fp8["model.layers.0.self_attn.in_proj"]["weight_scale"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_equals_modelopts_fake_quantisation(self, dtype: torch.dtype) -> None:
        """Each layer on its own input: the same codes, ties apart, and (fp32, which has no ties) the same output."""
        model = model_of(dtype)
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        paths = [n for n in names if not n.endswith(("lm_head", "ba_proj"))]
        weights = {n: model.get_parameter(f"{n}.weight") for n in paths}
        fake = calibrated_copy(model, paths, CALIBRATION)
        quantize_fp8(model, CALIBRATION)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for path in paths:

            def hook(m: nn.Module, args: Any, out: Tensor, path: str = path) -> None:
                seen[path] = (args[0], out)

            fake.get_submodule(path).register_forward_hook(hook)
        fake(CALIBRATION[0])
        for path in paths:
            x, expected = seen[path]
            theirs: Any = fake.get_submodule(path)
            ours: Any = model.get_submodule(path)
            assert_same_codes(theirs.weight_quantizer(weights[path]), ours.weight, weights[path], ours.weight_scale)
            assert_same_codes(theirs.input_quantizer(x), quantize(x, ours.input_scale), x, ours.input_scale)
            if dtype == torch.float32:
                assert relative_error(ours(x), expected) <= 1e-3, path

    def test_lm_head_becomes_its_own_copy(self) -> None:
        model = model_of()
        embedding = model.embed_tokens.weight.clone()
        report = quantize_fp8(model, CALIBRATION, lm_head=True)
        assert isinstance(model.lm_head, Fp8Linear) and "lm_head" in report.fp8
        assert torch.equal(model.embed_tokens.weight, embedding) and embedding.dtype == torch.bfloat16
        assert torch.isfinite(logits(model)).all()

    def test_published_goldens_stay_close(self, tmp_path) -> None:
        """E4M3 rounds each factor by up to 2^-4; after four layers the logits still point the same way."""
        golden = load_golden(DATA / "mini-bfloat16-b2-100-d6.safetensors")
        model = golden.model(tmp_path)
        ids = golden.input_ids[:, : golden.outputs["logits.prefill"].shape[1]]
        quantize_fp8(model, [ids])
        y, expected = model(ids).double(), golden.outputs["logits.prefill"].double()
        assert torch.cosine_similarity(y, expected, dim=-1).mean() > 0.98

    def test_frees_the_weights_it_replaces(self) -> None:
        model = model_of()
        old = weakref.ref(model.get_parameter("layers.0.mlp.down_proj.weight"))
        gc.disable()
        try:
            quantize_fp8(model, CALIBRATION[:1])
            assert old() is None
        finally:
            gc.enable()

    def test_prints_nothing_and_imports_late(self) -> None:
        code = (
            "import sys, torch; torch.set_num_threads(1); import jet_export.quantization.quantize as q\n"
            "assert not [m for m in sys.modules if m.split('.')[0] in ('modelopt', 'transformers')]\n"
            "from jet_export.model.config import JetNemotronConfig as C\n"
            "from jet_export.model.jet_nemotron import random_model\n"
            "m = random_model(C(hidden_size=32, intermediate_size=32, layer_types=('attn',), num_attention_heads=2,\n"
            "    num_key_value_heads=2, head_dim=16, jet_num_heads=2, head_k_dim=32, expand_v=1.0, vocab_size=64,\n"
            "    bos_token_id=0, eos_token_id=0,\n"
            "    max_position_embeddings=64))\n"
            "q.quantize_fp8(m, [torch.arange(32)[None]], progress=lambda done, n: print(done, 'of', n))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (0, "1 of 1\n", "")


class TestKeep:
    @pytest.mark.parametrize(
        "pattern, kept",
        [
            ("model.layers.1", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
            ("model.layers.1.mlp", ["mlp.gate_up_proj", "mlp.down_proj"]),
            ("model.layers.1.mlp.down_proj", ["mlp.down_proj"]),
            ("model.layers.1.*.o_proj", ["self_attn.o_proj"]),
        ],
    )
    def test_patterns(self, pattern: str, kept: list[str]) -> None:
        chosen, reasons = select(model_of(), [pattern], lm_head=False)
        names = {n for n, reason in reasons if reason == f"--keep {pattern}"}
        assert names == {f"model.layers.1.{k}" for k in kept}
        assert len(chosen) + len(names) == len(select(model_of(), [], lm_head=False)[0])

    def test_every_layer_by_glob(self) -> None:
        model = model_of()
        keep = ["model.layers.*.mlp.down_proj", "lm_head", "model.layers.0"]
        report = quantize_fp8(model, CALIBRATION[:1], keep=keep, lm_head=True)
        assert (
            {type(model.get_submodule(f"layers.{i}.mlp.down_proj")) for i in range(len(model.layers))}
            == {type(model.lm_head)}
            == {nn.Linear}
        )
        assert not [n for n in report.fp8 if n.endswith("down_proj") or n.startswith(("model.layers.0.", "lm_head"))]
        assert dict(report.kept)["lm_head"] == "--keep lm_head"

    def test_a_number_is_not_the_start_of_another(self) -> None:
        chosen, _ = select(model_of(layer_types=("attn",) * 11), ["model.layers.1"], lm_head=False)
        assert "layers.10.mlp.down_proj" in chosen and "layers.1.mlp.down_proj" not in chosen

    def test_a_pattern_without_a_match(self) -> None:
        with pytest.raises(JetExportError) as e:
            quantize_fp8(model_of(), CALIBRATION, keep=["model.layers.1", "model.layers.9"])
        assert str(e.value) == (
            "--keep model.layers.9: matches no layer.\nLayers are named like model.layers.0.mlp.down_proj."
        )

    def test_nothing_left(self) -> None:
        with pytest.raises(JetExportError, match="--keep leaves no layer to quantise"):
            quantize_fp8(model_of(), CALIBRATION, keep=["model.layers"])


class TestErrors:
    def test_size_of_one_layer(self) -> None:
        model = model_of(layer_types=("attn", "jet"), dconv_generator_reduction=5)  # R = 25, N of in_proj odd
        with pytest.raises(JetExportError) as e:
            quantize_fp8(model, CALIBRATION, keep=["model.layers.1.self_attn.in_proj"])
        assert str(e.value) == (
            "model.layers.1.self_attn.w2: input size 25 is not a multiple of 16, which FP8 needs.\n"
            "Keep such layers in bf16: --keep model.layers.1.self_attn.w2"
        )

    def test_size_of_many_layers_and_keeping_them(self) -> None:
        model = model_of(intermediate_size=100)
        with pytest.raises(JetExportError) as e:
            quantize_fp8(model, CALIBRATION)
        assert str(e.value) == (
            "model.layers.0.mlp.gate_up_proj: output size 200 is not a multiple of 16, which FP8 needs "
            "(nor are 7 other layers).\nKeep such layers in bf16: "
            "--keep 'model.layers.*.mlp.gate_up_proj' --keep 'model.layers.*.mlp.down_proj'"
        )
        report = quantize_fp8(model, CALIBRATION[:1], keep=["model.layers.*.mlp"])
        assert not [n for n in report.fp8 if ".mlp." in n]

    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
    def test_weight_without_a_scale(self, value: float) -> None:
        model = model_of()
        model.get_parameter("layers.2.mlp.down_proj.weight").fill_(value)
        with pytest.raises(
            JetExportError, match=r"model\.layers\.2\.mlp\.down_proj: its weight (.|\n)*--keep model"
        ) as e:
            quantize_fp8(model, CALIBRATION)
        assert f"{value:g}" in str(e.value)
        assert not [m for m in model.modules() if isinstance(m, Fp8Linear)]

    def test_input_without_a_scale(self) -> None:
        model = model_of()
        model.get_parameter("layers.1.post_attention_layernorm.weight").zero_()
        with pytest.raises(JetExportError, match=r"model\.layers\.1\.mlp\.gate_up_proj: its input .* 0 in calibration"):
            quantize_fp8(model, CALIBRATION)
        assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "jet_export"}

    def test_input_not_finite(self) -> None:
        model = model_of()
        model.get_parameter("layers.1.post_attention_layernorm.weight").fill_(math.nan)
        with pytest.raises(JetExportError, match=r"model\.layers\.1\.mlp\.gate_up_proj: its input is not finite"):
            quantize_fp8(model, CALIBRATION)

    def test_twice(self, quantised) -> None:
        with pytest.raises(JetExportError, match="FP8 already"):
            quantize_fp8(quantised[0], CALIBRATION)

    def test_no_modelopt(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
        with pytest.raises(JetExportError, match=r"needs nvidia-modelopt.*\npip install 'jet-export\[fp8\]'"):
            quantize_fp8(model_of(), CALIBRATION)

    def test_a_layer_that_was_missed(self, quantised) -> None:
        model, report = copy.deepcopy(quantised[0]), quantised[1]
        check_all_fp8(model, report)
        w = model.layers[3].mlp.down_proj.weight.float()
        model.layers[3].mlp.down_proj = nn.Linear(w.shape[1], w.shape[0], bias=False)
        with pytest.raises(
            JetExportError, match=r"model\.layers\.3\.mlp\.down_proj: should be FP8, and is torch.float32"
        ):
            check_all_fp8(model, report)
        check_all_fp8(quantised[0], report)
        with pytest.raises(JetExportError, match=r"lm_head: should be FP8"):
            check_all_fp8(quantised[0], report, lm_head=True)
        less = replace(report, fp8={n: s for n, s in report.fp8.items() if "layers.2.mlp.down" not in n})
        with pytest.raises(
            JetExportError, match=r"model\.layers\.2\.mlp\.down_proj: the report and the model disagree"
        ):
            check_all_fp8(quantised[0], less)


class TestReport:
    @pytest.mark.parametrize("lm_head", [False, True])
    def test_rebuilds_the_model_bit_for_bit(self, lm_head: bool, tmp_path) -> None:
        model = model_of()
        report = quantize_fp8(model, CALIBRATION, keep=["model.layers.2"], lm_head=lm_head)
        report.kv_scales = calibrate_kv_scales(model, CALIBRATION)
        weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or lm_head}
        save_file(weights, tmp_path / "weights.safetensors")
        (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))

        again = QuantizationReport.from_dict(json.loads((tmp_path / "report.json").read_text()))
        assert again == report
        fresh = empty_model(CONFIG, torch.bfloat16, torch.device("meta"), 256)
        apply_report(fresh, again)
        check_all_fp8(model, again, ["model.layers.2"], lm_head)
        loaded = load_file(tmp_path / "weights.safetensors")
        loaded.setdefault("lm_head.weight", loaded["embed_tokens.weight"])
        fresh.load_state_dict(loaded, assign=True)
        fresh.cos_sin = model.cos_sin
        assert torch.equal(logits(fresh), logits(model))
        assert torch.equal(logits(fresh, FP8), logits(model, FP8))

    def test_empty_report_changes_nothing(self) -> None:
        model = model_of()
        before = logits(model)
        apply_report(model, QuantizationReport.from_dict(QuantizationReport().to_dict()))
        assert torch.equal(logits(model), before)

    def test_of_another_model(self, quantised) -> None:
        other = model_of(layer_types=("attn", "jet"))
        with pytest.raises(JetExportError, match=r"model\.layers\.0\.self_attn\.in_proj is not a linear layer"):
            apply_report(other, quantised[1])
        with pytest.raises(JetExportError, match=r"model\.layers\.7\.self_attn is not an attention layer"):
            apply_report(model_of(), QuantizationReport(kv_scales={"model.layers.7.self_attn": (1.0, 1.0)}))

    def test_summary_says_what_and_why(self) -> None:
        names = ["model.layers.0.mlp.down_proj", "model.layers.12.mlp.down_proj", "model.layers.3.self_attn.o_proj"]
        kept = [("model.layers.3.mlp.down_proj", "--keep model.layers.3"), ("lm_head", "not asked for")]
        report = QuantizationReport(fp8={n: {} for n in names}, kept=kept, kv_scales={"model.layers.3": (1.0, 2.0)})
        assert report.summary() == [
            "fp8: model.layers.*.mlp.down_proj (2), model.layers.3.self_attn.o_proj",
            "not fp8: model.layers.3.mlp.down_proj: --keep model.layers.3",
            "not fp8: lm_head: not asked for",
        ]
        assert QuantizationReport(kept=kept[:0]).summary() == []

    @pytest.mark.parametrize("damage", [{"fp8": None}, {"kv_scales": {"a": 1}}, {"kept": [["a"]]}])
    def test_damaged(self, damage: dict[str, Any]) -> None:
        with pytest.raises(JetExportError, match="quantization is damaged"):
            QuantizationReport.from_dict({**QuantizationReport().to_dict(), **damage})

    def test_layer_table_counts_every_byte_once(self, quantised) -> None:
        model, report = quantised
        rows = {r.name: r for r in layer_table(model, report)}
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
        assert sum(r.nbytes for r in rows.values()) == sum(unique.values())
        assert rows["model.layers.1.mlp.down_proj"][1:4] == ("fp8", (64, 96), 64 * 96 + 8)
        assert rows["model.layers.0.self_attn.ba_proj"].note == "small"
        assert rows["model.layers.0.self_attn.A_log"].precision == "float32"
        assert rows["lm_head"].nbytes == 0 and "tied" in rows["lm_head"].note
        assert {n for n, r in rows.items() if r.precision == "fp8"} == set(report.fp8)
        meta = empty_model(CONFIG, torch.bfloat16, torch.device("meta"), 256)
        apply_report(meta, report)
        assert layer_table(meta, report) == list(rows.values())


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_exports_with_fp8_weights_only(quantised, mode: str) -> None:
    model, report = quantised
    limits = Limits(max_batch_size=4, max_seq_len=64, prefill_chunk=16)
    program = export_graph(model, mode, Dtypes(model=torch.bfloat16, kv_cache=torch.bfloat16), limits)
    for name in report.fp8:
        path = "model." + name.removeprefix("model.")
        assert program.state_dict[f"{path}.weight"].dtype == FP8
        assert f"{path}.weight" in program.graph_signature.buffers
        assert program.state_dict[f"{path}.input_scale"].shape == (1,)
    params = [p for p in program.graph_signature.parameters if p.removesuffix(".weight").removeprefix("model.")]
    linears = {p for p in params if program.state_dict[p].ndim == 2 and "embed" not in p and "lm_head" not in p}
    assert {p.rsplit(".", 2)[-2] for p in linears} == {"ba_proj"}
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert calls.count("aten.mm.default") == len(report.fp8)
    assert calls.count("aten.linear.default") == 2 + 1  # two ba_proj and lm_head
