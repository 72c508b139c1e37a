"""The package of a decode step: decode_one for a single sequence, in a bundle that has it."""

from pathlib import Path

import pytest
import torch
from helpers.eager_bundle import mini_config

from jet_export.backends.inductor import engine as module
from jet_export.backends.inductor.package import modes_for
from jet_export.backends.modes import FEW_ROWS, MAX_FEW_ROWS, MODES, ONE_ROW
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.kernels.skinny_gemm import MAX_ROWS


class Recorder:
    """Stands in for a package; returns the name of its file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.name = path.stem

    def load_weights(self, weights, path) -> None:
        self.weights = weights

    def __call__(self, *inputs):
        return self.name, len(inputs[0])


@pytest.fixture
def opened(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "Package", Recorder)

    def opened(*names: str) -> module.InductorEngine:
        for name in names:
            (tmp_path / f"{name}.pt2").touch()
        manifest = Manifest(
            model={"config": mini_config().to_dict()},
            backend={"name": "inductor"},
            target={"device": "cuda"},
            dtype="bfloat16",
            kv_cache_dtype="bfloat16",
            state_dtype="float32",
            limits=Limits(max_batch_size=4, max_seq_len=64, prefill_chunk=32),
        )
        return module.InductorEngine.open(tmp_path, manifest, {"w": torch.zeros(1)})

    return opened


def step(engine, n: int) -> tuple[str, int]:
    return engine.decode(torch.zeros(n, dtype=torch.int64), (), [])


def test_one_sequence_goes_to_its_own_package(opened) -> None:
    engine = opened(*modes_for("cuda"))
    assert [step(engine, n) for n in (1, 2, 64)] == [(ONE_ROW, 1), ("decode", 2), ("decode", 64)]
    assert all(p.weights is engine.weights for p in engine.graphs.values())


def test_a_few_sequences_go_to_theirs(opened) -> None:
    engine = opened(*modes_for("cuda", fused=True))
    names = [step(engine, n)[0] for n in (1, 2, MAX_FEW_ROWS, MAX_FEW_ROWS + 1)]
    assert names == [ONE_ROW, FEW_ROWS, FEW_ROWS, "decode"] and MAX_FEW_ROWS <= MAX_ROWS


def test_without_a_package_of_its_own_one_sequence_is_a_few(opened) -> None:
    assert step(opened(*modes_for("cuda", decode_one=False, fused=True)), 1) == (FEW_ROWS, 1)


def test_a_bundle_without_it_decodes_with_the_other(opened) -> None:
    assert step(opened(*MODES), 1) == ("decode", 1)
    assert modes_for("cpu") == MODES
