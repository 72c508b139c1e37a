"""benchmarks/training/retrofit_speed.py on a toy: its rows, and no speed where gradients are wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.paths import BENCHMARKS

from jet_export.model.config import JetNemotronConfig

sys.path.insert(0, str(BENCHMARKS / "training"))


def small() -> JetNemotronConfig:
    import retrofit_speed

    return replace(retrofit_speed.SMALL, hidden_size=64, layer_types=("jet", "attn"), window_size=0)


def test_every_phase_has_a_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import retrofit_speed

    monkeypatch.setattr(retrofit_speed, "WARM_UP", 1)
    monkeypatch.setattr(retrofit_speed, "check", lambda phase, device: {"float32": 0.0})
    small().save(tmp_path / "config.json")
    options = ["--model", str(tmp_path / "config.json"), "--length", "64", "--micro-batch", "1", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["x", *options, "--device", "cpu", "--output", str(tmp_path / "out.json")])
    retrofit_speed.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert [r["phase"] for r in result["rows"]] == ["features", "logits", "all"]
    assert all(r["tokens_per_s"] > 0 and r["hours"]["8"] > 0 and r["mfu"] is None for r in result["rows"])
    assert "tokens_per_s" in capsys.readouterr().out


def test_wrong_gradients_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import retrofit_speed

    calls: list[torch.dtype] = []
    real = retrofit_speed.gradients

    def wrong(phase, dtype, device):
        """Right for the CPU's two dtypes; wrong in the first call for a device."""
        calls.append(dtype)
        return {n: g * (2 if len(calls) == 3 else 1) for n, g in real(phase, dtype, device).items()}

    monkeypatch.setattr(retrofit_speed, "SMALL", small())
    monkeypatch.setattr(retrofit_speed, "CHECKED", 48)
    assert retrofit_speed.check("features", torch.device("cpu"))["float32"] == 0
    monkeypatch.setattr(retrofit_speed, "gradients", wrong)
    with pytest.raises(
        SystemExit, match=r"features, torch.float32: the gradient of layers.0.self_attn.A_log is off by 1"
    ):
        retrofit_speed.check("features", torch.device("cpu"))
