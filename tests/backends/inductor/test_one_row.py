"""Which package a decode step goes to: a bundle's third one, where it has it, for a single sequence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jet_export.backends import load as module
from jet_export.backends.graph import MODES, ONE_ROW, modes_for


class Recorder:
    """Stands in for a package; answers with the name of its file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.name = path.stem

    def load_weights(self, weights, path) -> None:
        self.weights = weights

    def __call__(self, *inputs):
        return self.name, len(inputs[0])


@pytest.fixture
def opened(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "Package", Recorder)
    monkeypatch.setattr(module, "manifest_specs", lambda manifest: [])

    def opened(*names: str) -> module.InductorEngine:
        for name in names:
            (tmp_path / f"{name}.pt2").touch()
        manifest: Any = type(
            "M", (), {"config": None, "limits": None, "device": torch.device("cuda"), "dtype": "bfloat16"}
        )
        return module.InductorEngine.open(tmp_path, manifest, {"w": torch.zeros(1)})

    return opened


def step(engine, n: int) -> tuple[str, int]:
    return engine.decode(torch.zeros(n, dtype=torch.int64), (), [])


def test_one_sequence_goes_to_its_own_package(opened) -> None:
    engine = opened(*modes_for("cuda"))
    assert [step(engine, n) for n in (1, 2, 64)] == [(ONE_ROW, 1), ("decode", 2), ("decode", 64)]
    assert all(p.weights is engine.weights for p in engine.graphs.values())


def test_a_bundle_without_it_decodes_all_the_same(opened) -> None:
    assert step(opened(*MODES), 1) == ("decode", 1)
    assert modes_for("cpu") == MODES
