"""What a TensorRT build refuses with one message before it begins, and what happens when its engine fails verify."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.rtx_bundles import needs_rtx, rtx_bundle
from typer.testing import CliRunner

from jet_export.backends.tensorrt.flavors import FLAVORS, Flavor
from jet_export.build import build as builds
from jet_export.build import plan as plans
from jet_export.build import tensorrt as trt_build
from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.cli.app import app
from jet_export.plugins import headers
from jet_export.utils.errors import JetExportError
from jet_export.verify import verify
from jet_export.verify.parity import StageResult


def options(**values) -> BuildOptions:
    return BuildOptions(model="jet-tiny", **{"backend": "tensorrt-rtx", "sm": "8.9", **values})


@pytest.fixture
def gpu(monkeypatch):
    """A machine that looks to the plan as if it had a GPU of SM 9.0."""
    monkeypatch.setattr(plans, "target_device", lambda requested: torch.device("cuda"))
    monkeypatch.setattr(plans, "host_target", lambda device: {"device": "cuda", "arch": "sm_90", "gpu": "a GPU"})


NO_RTX = r"--backend tensorrt-rtx: TensorRT for RTX has no engines for SM {} \(it has 8.0, 8.6, 8.9, 12.0\)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sm": "8.6", "fp8": True}, r"--fp8: SM 8.6 has no FP8 arithmetic, which needs 8.9 or newer"),
        ({"sm": "8.0", "kv_cache_dtype": "fp8"}, r"--kv-cache-dtype fp8: SM 8.0 has no FP8"),
        ({"sm": "9.0"}, NO_RTX.format("9.0") + r"\.\nUse --backend tensorrt on .* or --backend inductor"),
        ({"sm": "8.9,10.0"}, NO_RTX.format("10.0")),
        ({"sm": None}, r"--backend tensorrt-rtx: no GPU here, so .*\nPass --sm"),
        ({"backend": "tensorrt"}, r"--backend tensorrt: builds on the GPU .*has none.\n.*tensorrt-rtx --sm 8.9"),
        ({"backend": "inductor", "sm": None, "keep_onnx": True}, r"--keep-onnx: the inductor backend has no"),
    ],
)
def test_refused_by_the_plan(given, message) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(JetExportError, match=message):
        make_plan(options(**given))


def test_targets(gpu) -> None:
    assert make_plan(options()).target == {"device": "cuda", "arch": "sm_89", "sms": [89]}
    own = make_plan(options(backend="tensorrt", sm=None, fp8=True))
    assert own.target == {"device": "cuda", "arch": "sm_90", "gpu": "a GPU", "sms": [90]} and own.sms == (90,)
    more = make_plan(options(backend="tensorrt", sm="8.9,9.0"))
    assert more.target == own.target and more.sms == (89, 90)
    with pytest.raises(
        JetExportError, match=r"--sm: leaves out this GPU's 9.0, which the engine is built for.\nAdd it"
    ):
        make_plan(options(backend="tensorrt", sm="8.9"))
    with pytest.raises(JetExportError, match=NO_RTX.format("9.0")):
        make_plan(options(sm=None))


def build(tmp_path: Path, **values) -> list[str]:
    lines: list[str] = []
    run_build(make_plan(options(output=tmp_path / "bundle", device="cpu", **values)), ["jet-export"], lines.append)
    return lines


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"--backend tensorrt-rtx needs TensorRT for RTX, which is not installed.\npip install 'jet-export\["),
        ("1.1.0", r"--backend tensorrt-rtx needs TensorRT for RTX 1.2 or newer, this is 1.1.0"),
    ],
)
def test_without_tensorrt_nothing_is_written(tmp_path, monkeypatch, found, message) -> None:
    monkeypatch.setattr(Flavor, "version", lambda self: found)
    monkeypatch.setattr("jet_export.backends.tensorrt.flavors.find_spec", lambda name: object())
    with pytest.raises(JetExportError, match=message):
        build(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize(
    ("missing", "message"),
    [("headers", r"TensorRT headers were not found.*\n.*--fetch-headers"), ("compiler", r"no C\+\+ compiler")],
)
def test_without_headers_or_compiler_nothing_is_written(tmp_path, monkeypatch, missing, message) -> None:
    if missing == "headers":
        monkeypatch.setattr(headers, "installed_headers", lambda: None)
        monkeypatch.setenv("JET_EXPORT_CACHE", str(tmp_path / "none"))
    else:
        (tmp_path / "headers").mkdir()
        (tmp_path / "headers/NvInferRuntime.h").touch()
        monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(JetExportError, match=message):
        build(tmp_path, tensorrt_headers=tmp_path / "headers" if missing == "compiler" else None)
    assert not (tmp_path / "bundle").exists()


def test_full_tensorrt_is_not_installed_here(gpu, monkeypatch) -> None:
    if FLAVORS["tensorrt"].version():
        pytest.skip("it is")
    plan = make_plan(options(backend="tensorrt", sm=None))
    with pytest.raises(
        JetExportError, match=r"--backend tensorrt needs TensorRT, which is not installed.\npip install"
    ):
        trt_build.require(plan)


@pytest.fixture
def quick(tmp_path_factory, monkeypatch, tmp_path):
    """A build that reuses an engine built before, on a machine with its GPU."""
    built = rtx_bundle(tmp_path_factory, "jet-tiny bf16")

    def write_engine(plan, tmp, progress, fp8) -> None:
        for name in ("engine.plan", "libjet_plugins.so", "layers.json"):
            shutil.copyfile(built / name, tmp / name)
        (tmp / "model.onnx").unlink()

    monkeypatch.setattr(trt_build, "write_engine", write_engine)
    monkeypatch.setattr(builds, "host_target", lambda device: {"arch": "sm_89"})
    return tmp_path


@needs_rtx
@pytest.mark.parametrize("passes", [True, False])
def test_an_engine_is_verified_where_its_gpu_is(quick, monkeypatch, passes) -> None:
    """Before the bundle is moved into place, which does not happen where verification fails."""

    def verify_bundle(bundle: Path, text, seed, emit) -> verify.Verification:
        assert Manifest.load(bundle).files and (bundle / WEIGHTS).exists() and bundle != quick / "bundle"
        problems = [] if passes else ["decode: logits: relative error 0.5, bound 0.01"]
        return verify.Verification(str(bundle), [StageResult("decode", 1, [], problems)], device="a GPU")

    monkeypatch.setattr(verify, "verify_bundle", verify_bundle)
    if not passes:
        with pytest.raises(JetExportError, match=r"fails its verification, so no bundle is written:\n  decode: log"):
            build(quick)
        assert not list(quick.iterdir())
        return
    build(quick)
    assert Manifest.load(quick / "bundle").build["verified"] == {"passed": True, "device": "a GPU", "seconds": 0.0}
    assert build(quick) == [f"{quick / 'bundle'} is up to date."]
    with pytest.raises(JetExportError, match=r"holds a bundle built from other inputs.*target"):
        run_build(make_plan(replace(options(sm="8.9,12.0"), output=quick / "bundle", device="cpu")), [])


@needs_rtx
def test_inspect_shows_the_layers(tmp_path_factory) -> None:
    bundle = rtx_bundle(tmp_path_factory, "jet-tiny fp8, 3 layers")
    done = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "NOT verified: built without a GPU of SM 8.9, 12.0" in done.stdout
    assert "plugin self_attn.JetBlock 1 1" in lines and "copies 0 0" in lines
    assert "GEMM mlp.down_proj fp8 x fp8 -> bf16 3 3" in lines
    assert json.loads((bundle / "manifest.json").read_text())["backend"]["library_in_plan"] is True
