"""Loading: weights and hashes in parallel, no native code before the check ends, and no unused imports."""

import subprocess
import sys
import threading

import pytest
import torch
from helpers.eager_bundle import mini_config

from jet_export.backends import load
from jet_export.backends.inductor import engine
from jet_export.backends.load import load_engine
from jet_export.bundle.dtypes import dtype_name
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import WEIGHTS, Manifest, describe_files
from jet_export.bundle.target import host_target
from jet_export.model.jet_nemotron import random_model
from jet_export.model.weights import save_tensors
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import sha256_file

LIMITS = Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=64)


@pytest.fixture
def bundle(tmp_path):
    """The files of an inductor bundle; the packages are a few bytes."""
    model = random_model(mini_config(), torch.float32, max_positions=64)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_tensors({**tensors, "cos_sin": model.cos_sin}, tmp_path / WEIGHTS)
    for mode in ("prefill", "decode"):
        (tmp_path / f"{mode}.pt2").write_bytes(b"package")
    described = {"name": "mini", "source": "random", "licence": None, "config": model.config.to_dict()}
    backend, dtype = {"name": "inductor", "torch": torch.__version__}, dtype_name(torch.float32)
    manifest = Manifest(
        model=described,
        backend=backend,
        target=host_target(torch.device("cpu")),
        dtype=dtype,
        kv_cache_dtype=dtype,
        state_dtype=dtype,
        limits=LIMITS,
    )
    manifest.files = describe_files(tmp_path)
    manifest.save(tmp_path)
    return tmp_path


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Packages whose native code was loaded."""
    names: list[str] = []

    class Package:
        def __init__(self, path, device) -> None:
            names.append(path.name)

        def load_weights(self, weights, path) -> None:
            assert "lm_head.weight" in weights

    monkeypatch.setattr(engine, "Package", Package)
    return names


def test_packages_come_after_the_check_and_weights_beside_it(bundle, loaded, monkeypatch) -> None:
    """The check waits for the weights to be loaded: in sequence they would never end."""
    weights_there = threading.Event()
    order: list[str] = []
    check_files, load_weights = load.__dict__["check_files"], load.__dict__["load_weights"]

    def check(directory, manifest) -> None:
        assert weights_there.wait(60)
        assert loaded == []
        check_files(directory, manifest)
        order.append("checked")

    def load_after(directory, manifest):
        weights = load_weights(directory, manifest)
        order.append("weights")
        weights_there.set()
        return weights

    monkeypatch.setattr(load, "check_files", check)
    monkeypatch.setattr(load, "load_weights", load_after)
    load_engine(bundle)
    assert order == ["weights", "checked"]
    assert loaded == ["prefill.pt2", "decode.pt2"]


@pytest.mark.parametrize("name", [WEIGHTS, "decode.pt2"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_the_check_reports_damage(bundle, loaded, name, damage) -> None:
    """Even where the weights cannot be read at all."""
    data = (bundle / name).read_bytes()
    if damage == "gone":
        (bundle / name).unlink()
    else:
        (bundle / name).write_bytes(data[: len(data) // 2] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(JetExportError, match=f"{name} is missing" if damage == "gone" else f"{name} has changed"):
        load_engine(bundle)
    assert loaded == []


@pytest.mark.parametrize("size", [0, 1, 1 << 22, (1 << 22) + 1])
def test_sha256(tmp_path, size) -> None:
    import hashlib

    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


def test_the_runtime_does_not_import_torchs_compiler() -> None:
    """That takes a second at every start, and engines on a GPU do not need it."""
    code = (
        "import sys, jet_export.runtime.llm, jet_export.runtime.async_llm\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'sympy', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
