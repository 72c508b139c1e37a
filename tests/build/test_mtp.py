"""`build --mtp`: the bundle has the checkpoint's multi-token-prediction layer, or the build is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mtp import checkpoint, with_predictor
from helpers.qwen import load_qwen

from jet_export.backends.eager import load_eager
from jet_export.backends.inductor import package
from jet_export.build import inductor
from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import Manifest
from jet_export.kernels.form import Form
from jet_export.model.cache import PAGE, PackedBatch, mtp_spec
from jet_export.utils.errors import JetExportError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("mtp"))


def options(directory: Path, **changes: Any) -> BuildOptions:
    values = {"model": str(directory), "device": "cpu", "backend": "inductor", "dtype": "float32", "max_seq_len": 128}
    return BuildOptions(**{**values, "speculate": 3, "mtp": True, "max_batch_size": 3, **changes})


def test_the_bundle_has_the_layer(directory: Path, tmp_path, monkeypatch) -> None:
    """Its weights, its packages, exported but not compiled, and what it needs in the manifest."""
    made = []

    def write(program: Any, path: Path, dependent: bool) -> None:
        made.append(path.name)
        path.write_bytes(b"package")

    monkeypatch.setattr(package, "compile_package", write)
    monkeypatch.setattr(inductor, "check_loads", lambda *_: None)
    output = run_build(make_plan(options(directory, output=tmp_path / "out")), ["jet-export"], lambda _: None)
    assert made == ["prefill.pt2", "decode.pt2", "verify.pt2", "mtp_prefill.pt2", "mtp_decode.pt2"]
    manifest = Manifest.load(output)
    assert manifest.mtp and manifest.dtypes.specs(manifest.config)[-1].name == "layers.3.hidden_states"
    engine, model = load_eager(output, manifest), with_predictor(directory)
    zero, table = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    batch = PackedBatch(torch.tensor([0, 2], dtype=torch.int32), zero, zero, table, table)
    inputs = torch.tensor([3, 5]), torch.randn(2, manifest.config.hidden_size), batch, zero
    caches = [torch.zeros(1, *mtp_spec(manifest.config, torch.float32).shape) for _ in range(2)]
    assert model.mtp is not None
    want = model.mtp(*inputs, caches[0], Form.MIXED)
    assert all(torch.equal(a, b) for a, b in zip(engine.predict(*inputs, caches[1]), want, strict=True))
    assert torch.equal(*caches) and caches[0].abs().sum() > 0


def test_memory_counts_what_drafting_keeps(directory: Path) -> None:
    with_layer, without = (make_plan(options(directory, mtp=mtp)).memory for mtp in (True, False))
    d, hkv, dh = 64, 2, 32
    assert with_layer.kv_full - without.kv_full == 3 * PAGE * (d + 2 * hkv * dh) * 4
    predictor = with_predictor(directory).mtp
    assert predictor is not None
    layer = sum(p.nbytes for p in predictor.parameters())
    assert with_layer.weights - without.weights == layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculate": 0}, "--mtp: its drafts have to be verified"),
        ({"backend": "onnx"}, "--mtp: not for onnx"),
        ({"model": "jet-tiny"}, "--mtp: jet_nemotron models have no multi-token-prediction layer"),
    ],
)
def test_other_builds_are_refused(directory: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        make_plan(options(directory, **changes))


def test_a_checkpoint_without_the_layer_is_refused_before_anything_is_built(tmp_path) -> None:
    bare = load_qwen("qwen3_5").save_checkpoint(tmp_path)
    with pytest.raises(JetExportError, match=r"the checkpoint has no mtp\.\* tensors"):
        make_plan(options(bare))
