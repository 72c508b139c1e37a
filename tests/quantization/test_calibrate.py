"""Calibration: text to tokens, and the scales of an FP8 KV cache."""

from typing import Any

import pytest
import torch
from helpers.fp8_models import CALIBRATION, model_of
from torch import Tensor, nn

from jet_export.model.cache import states_per_layer
from jet_export.model.fp8 import FP8
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.quantization.calibrate import calibrate_kv_scales, calibration_tokens, read_calibration_text
from jet_export.utils.errors import JetExportError


@pytest.fixture(scope="module")
def calibrated() -> tuple[JetNemotronForCausalLM, dict[str, tuple[float, float]]]:
    model = model_of()
    return model, calibrate_kv_scales(model, CALIBRATION)


class TestKvScales:
    def test_are_the_largest_magnitudes_over_448(self, calibrated) -> None:
        """Values are seen on qkv_proj's output, keys through a cache of a full-attention layer."""
        model, scales = calibrated
        assert list(scales) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
        v_amax = {1: 0.0, 2: 0.0}
        k_norm = {1: 0.0, 2: 0.0}
        handles = []
        for i in (1, 2):

            def hook(m: nn.Module, args: Any, out: Tensor, i: int = i) -> None:
                v_amax[i] = max(v_amax[i], float(out[:, -32:].abs().max()))
                pairs = out[:, 64:96].float().view(-1, 2, 2, 8)  # [T, Hkv, half, Dh / 2]: rotated in pairs
                k_norm[i] = max(k_norm[i], float(pairs.norm(dim=2).max()))

            handles.append(model.layers[i].self_attn.qkv_proj.register_forward_hook(hook))
        for ids in CALIBRATION:
            model(ids)
        for h in handles:
            h.remove()
        for i in (1, 2):
            layer = model.layers[i].self_attn
            assert (layer.k_scale, layer.v_scale) == scales[f"model.layers.{i}.self_attn"]
            assert layer.v_scale == v_amax[i] / 448
            assert 2**-0.5 * 0.98 * k_norm[i] / 448 <= layer.k_scale <= 1.02 * k_norm[i] / 448  # a rotation

    def test_cache_error_is_half_a_step(self, calibrated) -> None:
        """Reading back differs from the bf16 cache by half an E4M3 step (2^-4 relative; 2^-10 scale when subnormal),
        and nothing of the calibration text is clamped."""
        model, _ = calibrated
        ids = CALIBRATION[0]
        exact, fp8 = model.new_cache(1, 64), model.new_cache(1, 64, kv_dtype=FP8)
        model(ids, cache=exact)
        model(ids, cache=fp8)
        # Only the first attention layer sees the same input under both caches.
        (a,), (b,) = (states_per_layer(model.config, c.states)[1] for c in (exact, fp8))
        layer = model.layers[1].self_attn
        assert b.dtype == FP8 and a.count_nonzero() > 0
        for part, scale in ((0, layer.k_scale), (1, layer.v_scale)):
            x, y = a[:, part].double(), b[:, part].double() * scale
            assert ((x - y).abs() <= torch.maximum(x.abs() * 2**-4, torch.tensor(scale * 2**-10)) * (1 + 1e-6)).all()

    def test_zero_keys(self) -> None:
        model = model_of()
        attention: Any = model.layers[2].self_attn
        attention.qkv_proj.weight[64:96].zero_()
        with pytest.raises(JetExportError, match=r"model\.layers\.2\.self_attn: its keys have .* 0 in calibration"):
            calibrate_kv_scales(model, CALIBRATION)


class TestCalibrationText:
    def test_bytes_without_a_tokenizer(self) -> None:
        (ids,) = calibration_tokens(None, "a\u00e9", vocab_size=100)
        assert ids.tolist() == [[b % 100 for b in "a\u00e9".encode()]] and ids.dtype == torch.int64

    def test_windows_span_the_text(self) -> None:
        text = "".join(chr(33 + i % 90) for i in range(1000))
        windows = calibration_tokens(None, text, vocab_size=256, seq_len=100, windows=4)
        assert [w.shape for w in windows] == [(1, 100)] * 4
        assert [w[0].tolist() for w in windows] == [list(text.encode())[s : s + 100] for s in (0, 300, 600, 900)]

    def test_short_text_gives_what_there_is(self) -> None:
        assert [w.shape for w in calibration_tokens(None, "x" * 150, vocab_size=256, seq_len=100)] == [
            (1, 100),
            (1, 100),
        ]
        assert [w.shape for w in calibration_tokens(None, "x" * 30, vocab_size=256, seq_len=100)] == [(1, 30)]

    def test_tokenizer(self) -> None:
        class Words:
            def encode(self, text: str) -> list[int]:
                return [len(w) for w in text.split()]

        (ids,) = calibration_tokens(Words(), "a bb ccc", vocab_size=10)
        assert ids.tolist() == [[1, 2, 3]]
        with pytest.raises(JetExportError, match="the tokenizer gives id 3, the model has 3 tokens"):
            calibration_tokens(Words(), "a bb ccc", vocab_size=3)
        with pytest.raises(JetExportError, match="no tokens"):
            calibration_tokens(Words(), " ", vocab_size=10)

    def test_files(self, tmp_path) -> None:
        path = tmp_path / "text"
        path.write_text("gr\u00fc\u00df", encoding="utf-8")
        assert read_calibration_text(path) == "gr\u00fc\u00df"
        path.write_bytes(b"ab\xff\xfe")
        with pytest.raises(JetExportError, match=r"text: not UTF-8 \(byte 2 is 0xff\)\.\n--calibration takes"):
            read_calibration_text(path)
        path.write_text(" \n")
        with pytest.raises(JetExportError, match="text: empty"):
            read_calibration_text(path)
        with pytest.raises(JetExportError, match="missing: cannot be read"):
            read_calibration_text(tmp_path / "missing")
        with pytest.raises(JetExportError, match="cannot be read"):
            read_calibration_text(tmp_path)
