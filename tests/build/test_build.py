"""The build's flow with a compiler that only writes a few bytes: up to date, --force, no half-written bundles.

What the real compiler makes is tested in tests/verify.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.eager_bundle import write_mini_config
from helpers.golden import DATA, MINI_NAMES, load_golden
from helpers.paths import ROOT

from jet_export.backends.eager import load_weights
from jet_export.backends.inductor import package
from jet_export.backends.inductor.engine import Package
from jet_export.backends.load import check_bundle
from jet_export.build import backend_choice as backends
from jet_export.build import inductor, steps
from jet_export.build import plan as plans
from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import Manifest
from jet_export.bundle.memory import weight_bytes
from jet_export.bundle.target import has_dependent_launch
from jet_export.cli.inspect_report import inspect_bundle
from jet_export.model.hub import checkpoint_licence, licence_files
from jet_export.utils.errors import JetExportError


@pytest.fixture
def quick(monkeypatch):
    """Builds without exporting and compiling; returns the names of the packages that were "compiled"."""
    made = []

    def compile_package(program, path: Path, dependent: bool) -> None:
        assert not dependent  # on a CPU
        made.append(path.name)
        path.write_bytes(b"package")

    monkeypatch.setattr(package, "export_graph", lambda *_, fused: None)
    monkeypatch.setattr(package, "compile_package", compile_package)
    monkeypatch.setattr(inductor, "check_loads", lambda directory, device: None)
    return made


def options(tmp_path: Path, **changes) -> BuildOptions:
    model = str(write_mini_config(tmp_path)) if "model" not in changes else changes.pop("model")
    values = {"device": "cpu", "random_weights": True, "max_seq_len": 256, "output": tmp_path / "out" / "bundle"}
    return BuildOptions(model=model, **{**values, **changes})


def make(o: BuildOptions) -> list[str]:
    lines: list[str] = []
    run_build(make_plan(o), ["jet-export", "build"], lines.append)
    return lines


def test_second_build_is_up_to_date(quick, tmp_path) -> None:
    make(options(tmp_path))
    assert quick == ["prefill.pt2", "decode.pt2"]
    manifest = (tmp_path / "out/bundle/manifest.json").read_bytes()
    assert make(options(tmp_path)) == [f"{tmp_path / 'out/bundle'} is up to date."]
    assert quick == ["prefill.pt2", "decode.pt2"]
    assert (tmp_path / "out/bundle/manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "weights was random, seed 0, now random, seed 1"),
        ({"max_batch_size": 3}, "limits.max_batch_size was 8, now 3"),
        ({"state_dtype": "bfloat16"}, "state_dtype was float32, now bfloat16"),
        ({"dtype": "float32"}, "dtype was bfloat16, now float32"),
    ],
)
def test_other_inputs_are_named_and_need_force(quick, tmp_path, change: dict, named: str) -> None:
    make(options(tmp_path))
    before = (tmp_path / "out/bundle/manifest.json").read_bytes()
    with pytest.raises(JetExportError, match=named):
        make(options(tmp_path, **change))
    assert (tmp_path / "out/bundle/manifest.json").read_bytes() == before
    make(options(tmp_path, **change, force=True))
    assert len(quick) == 4
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["bundle"]


def test_failure_leaves_nothing_and_keeps_the_old_bundle(quick, tmp_path, monkeypatch) -> None:
    make(options(tmp_path))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out/bundle").iterdir()}

    def broken(program, path: Path, dependent: bool) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "compile_package", broken)
    with pytest.raises(KeyboardInterrupt):
        make(options(tmp_path, seed=1, force=True))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["bundle"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out/bundle").iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        make(options(tmp_path, output=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_an_output_that_is_not_a_bundle_is_left_alone(quick, tmp_path) -> None:
    (tmp_path / "out/bundle").mkdir(parents=True)
    (tmp_path / "out/bundle/thesis.txt").write_text("mine")
    with pytest.raises(JetExportError, match="exists and is not a bundle"):
        make(options(tmp_path))
    assert (tmp_path / "out/bundle/thesis.txt").read_text() == "mine"


def test_manifest_and_weights(quick, tmp_path) -> None:
    make(options(tmp_path, max_batch_size=3, prefill_chunk=64))
    directory = tmp_path / "out/bundle"
    m = Manifest.load(directory)
    check_bundle(directory, m)
    assert (m.limits.max_batch_size, m.limits.max_seq_len, m.limits.prefill_chunk) == (3, 256, 64)
    assert m.config.to_dict() == m.model["config"]
    weights = load_weights(directory, m)
    assert weights["cos_sin"].shape == (256, m.config.head_dim)
    assert weights["lm_head.weight"] is weights["embed_tokens.weight"]
    assert weights["layers.0.self_attn.A_log"].dtype == torch.float32
    stored = sum(t.nbytes for k, t in weights.items() if k not in ("cos_sin", "lm_head.weight"))
    assert stored == weight_bytes(m.config, torch.bfloat16, fp8=False)


def test_checkpoint_build_copies_tokenizer_and_licence(quick, tmp_path) -> None:
    checkpoint = load_golden(DATA / MINI_NAMES[0]).save_checkpoint(tmp_path / "ckpt")
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "generation_config.json").write_text("{}")
    (checkpoint / "LICENSE").write_text("The Licence, version 1\nmore\n")
    make(options(tmp_path, model=str(checkpoint), random_weights=False))
    directory = tmp_path / "out/bundle"
    assert (directory / "tokenizer/tokenizer.json").read_text() == "{}"
    assert (directory / "generation_config.json").is_file()
    assert not (directory / "tokenizer.json").exists()
    assert (directory / "LICENSE").exists()
    assert Manifest.load(directory).model["licence"] == "The Licence, version 1"


def test_licence_of_a_model_card(tmp_path) -> None:
    assert checkpoint_licence(tmp_path) is None
    (tmp_path / "README.md").write_text("# A model\n\n---\nlicense: not-here\n---\n")
    assert checkpoint_licence(tmp_path) is None and licence_files(tmp_path) == []
    card = tmp_path / "README.md"
    card.write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# A model\n")
    assert checkpoint_licence(tmp_path) == "apache-2.0"
    assert licence_files(tmp_path) == [card]  # goes along: nothing else names the licence
    (tmp_path / "LICENSE").write_text("The Licence, version 1\n")
    assert checkpoint_licence(tmp_path) == "The Licence, version 1"
    assert licence_files(tmp_path) == [tmp_path / "LICENSE"]


def test_more_positions_than_trained_is_a_warning_in_the_manifest(quick, tmp_path) -> None:
    plan = make_plan(options(tmp_path, max_seq_len=8192))
    assert "8192 exceeds the 4096 positions" in plan.warnings[0]
    make(options(tmp_path, max_seq_len=8192))
    assert Manifest.load(tmp_path / "out/bundle").warnings == plan.warnings


def test_auto_never_picks_a_backend_unseen_on_the_architecture() -> None:
    seen = backends.choose_backend("auto", "x86_64")
    assert (seen.name, seen.warning) == ("inductor", None) and ".py" not in seen.reason
    assert backends.choose_backend("inductor", "sm_75").reason == "asked for by name"


@pytest.mark.parametrize("arch", ["aarch64", "sm_75"])
def test_auto_is_inductor_with_a_warning_where_nothing_has_run(quick, tmp_path, monkeypatch, arch: str) -> None:
    monkeypatch.setattr(backends, "SEEN_RUNNING", {})
    choice = backends.choose_backend("auto", arch)
    assert choice.name == "inductor" and f"running on {arch}: run jet-export verify" in str(choice.warning)
    assert backends.choose_backend("inductor", arch).warning is None
    assert any("has not been seen running on" in warning for warning in make_plan(options(tmp_path)).warnings)


GPUS = {"sm_90": ("NVIDIA H100", "NVIDIA H200")}


def test_every_seen_backend_names_a_committed_result() -> None:
    """A test that builds, verifies and runs such an engine, or the JSON of a bundle that did on such a GPU."""
    root = ROOT
    for kinds in backends.SEEN_RUNNING.values():
        for arch, seen in kinds.items():
            path = seen.file
            assert (root / path).is_file(), path
            if arch.startswith("sm_"):
                result = json.loads((root / path).read_text())
                assert result["environment"]["gpu"].startswith(GPUS[arch])
                verified = [r for r in result["results"] if r.get("verify_exit_status") == 0]
                assert verified
                assert all(r["verify"]["passed"] and r["verify"]["stages"] for r in verified)


def test_no_compiler(quick, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(JetExportError, match="no C\\+\\+ compiler: no-such-compiler is not on the PATH"):
        make(options(tmp_path))
    assert not (tmp_path / "out").exists()


def test_no_modelopt(quick, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(JetExportError, match=r"--fp8 needs nvidia-modelopt.*\npip install 'jet-export\[fp8\]'"):
        make(options(tmp_path, fp8=True))
    assert not (tmp_path / "out").exists()


def test_requirements_come_before_a_download(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(steps, "resolve_checkpoint", lambda name: pytest.fail("downloaded"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(JetExportError, match="no-such-compiler"):
        make(BuildOptions(model="jet-2b", device="cpu", output=tmp_path / "out"))


def relu() -> torch.export.ExportedProgram:
    return torch.export.export(torch.nn.ReLU(), (torch.randn(3, 2),))


@pytest.fixture(scope="module")
def by_two_words(tmp_path_factory) -> Path:
    """A directory with a package and nothing else; beside it the log of the calls of the compiler that made it."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("two-words")
    launcher = folder / "launcher"
    launcher.write_text(f'#!/bin/sh\necho called >>{folder}/log\nexec "$@"\n')
    launcher.chmod(0o755)
    (folder / "good").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", f"{launcher} g++")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))  # nothing compiled before
        package.compile_package(relu(), folder / "good/a.pt2")
    return folder / "good"


def test_a_compiler_of_two_words_compiles_a_package(by_two_words) -> None:
    """CXX="ccache g++": torch alone would look for a program of that name."""
    x = torch.randn(3, 2)
    assert torch.equal(Package(by_two_words / "a.pt2", torch.device("cpu"))(x), x.relu())
    log = by_two_words.parent / "log"
    assert len(log.read_text().splitlines()) > 1  # the probe of find_compiler, and the package


def test_compiler_whose_packages_crash_on_load(by_two_words, tmp_path) -> None:
    """A library whose constructor aborts stands in for one that an incompatible compiler built."""
    cxx = shutil.which("g++")
    if cxx is None:
        pytest.skip("no g++")
    (tmp_path / "crash.c").write_text("#include <stdlib.h>\n__attribute__((constructor)) void f(void) { abort(); }\n")
    subprocess.run([cxx, "-x", "c", "-fPIC", "-shared", "crash.c", "-o", "crash.so"], cwd=tmp_path, check=True)
    good = by_two_words
    package.check_loads(good)
    bad = tmp_path / "bad"
    bad.mkdir()
    with zipfile.ZipFile(good / "a.pt2") as source, zipfile.ZipFile(bad / "a.pt2", "w") as target:
        for item in source.infolist():
            crash = item.filename.endswith(".so")
            target.writestr(item, (tmp_path / "crash.so").read_bytes() if crash else source.read(item))
    with pytest.raises(JetExportError, match=r"do not load: .* dies of SIGABRT(.|\n)*export CC=/usr/bin/gcc"):
        package.check_loads(bad)


def tokenizer_of(directory: Path, words: int) -> Path:
    """A directory with a tokenizer of so many words, and a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    directory.mkdir()
    vocab = {f"w{i}": i for i in range(words)}
    Tokenizer(WordLevel(vocab, unk_token="w0")).save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return directory


def test_random_weights_take_a_tokenizer_along(quick, tmp_path) -> None:
    given = tokenizer_of(tmp_path / "tokenizer", 100)
    make(options(tmp_path, tokenizer=given))
    bundle = tmp_path / "out/bundle"
    assert (bundle / "tokenizer/tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    manifest = Manifest.load(bundle)
    assert {
        f"tokenizer/{n}" for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    } <= manifest.files.keys()
    assert make(options(tmp_path, tokenizer=given)) == [f"{bundle} is up to date."]
    with pytest.raises(JetExportError, match=r"other inputs \(tokenizer was \w+.*, now None\)"):
        make(options(tmp_path))


def test_tokenizers_that_do_not_fit_are_refused(tmp_path) -> None:
    large = tokenizer_of(tmp_path / "large", 129)  # the model's vocabulary is 128
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text("{")
    for given, message in (
        (large, r"its ids go up to 128, the model's vocabulary has 128"),
        (tmp_path, r"no tokenizer.json there"),
        (damaged, r"not a tokenizer.json"),
    ):
        with pytest.raises(JetExportError, match=message):
            make_plan(options(tmp_path, tokenizer=given))
    with pytest.raises(JetExportError, match="--tokenizer: belongs to --random-weights"):
        make_plan(options(tmp_path, model="jet-tiny", random_weights=False, tokenizer=large))


def test_a_bundle_with_fast_accumulation_is_another_bundle(quick, tmp_path, capsys) -> None:
    pytest.importorskip("modelopt")
    given = options(tmp_path, fp8=True, fast_accumulation=True)
    make(given)
    directory = tmp_path / "out/bundle"
    m = Manifest.load(directory)
    assert m.fast_accumulation and m.dtypes.fast_accumulation
    assert m.warnings == make_plan(given).warnings
    assert re.search(r"--fast-accumulation: changes nothing on \w+, only on GPUs of SM 8.9 and 9.0", m.warnings[0])
    assert make(given) == [f"{directory} is up to date."]
    with pytest.raises(JetExportError, match=r"other inputs \(fast_accumulation was True, now None\)"):
        make(options(tmp_path, fp8=True))
    inspect_bundle(directory, None, None)
    assert "FP8 products of cuBLAS summed by fast accumulation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"--fast-accumulation: is about FP8 products, and this build has none.\nAdd --fp8"),
        ({"fp8": True, "backend": "onnx"}, r"--fast-accumulation: the onnx backend decides .*\n.*--backend inductor"),
        (
            {"fp8": True, "backend": "tensorrt-rtx", "sm": "8.9"},
            r"--fast-accumulation: the tensorrt-rtx backend decides by itself how products are summed",
        ),
    ],
)
def test_fast_accumulation_is_refused_where_no_fp8_product_is_the_library_s(tmp_path, changes, message) -> None:
    with pytest.raises(JetExportError, match=message):
        make_plan(options(tmp_path, fast_accumulation=True, **changes))


@pytest.mark.parametrize(("sm", "warned"), [((8, 9), False), ((9, 0), False), ((10, 0), True)])
def test_fast_accumulation_warns_where_it_has_no_effect(tmp_path, monkeypatch, sm, warned: bool) -> None:
    as_if_on_a_gpu(monkeypatch, sm)
    plan = make_plan(options(tmp_path, fp8=True, fast_accumulation=True))
    assert any("--fast-accumulation: changes nothing" in w for w in plan.warnings) is warned


def test_fast_accumulation_needs_a_gpu_with_fp8(tmp_path, monkeypatch) -> None:
    as_if_on_a_gpu(monkeypatch, (8, 0))
    with pytest.raises(JetExportError, match=r"--fp8: sm_80 has no FP8 arithmetic.\nFP8 needs SM 8.9 or newer"):
        make_plan(options(tmp_path, fp8=True, fast_accumulation=True))


def as_if_on_a_gpu(monkeypatch, sm: tuple[int, int]) -> None:
    target = {"device": "cuda", "arch": f"sm_{sm[0]}{sm[1]}", "gpu": "a GPU"}
    monkeypatch.setattr(plans, "target_device", lambda requested: torch.device("cuda"))
    monkeypatch.setattr(plans, "host_target", lambda device: target)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: sm)


def test_fused_decode_is_refused_where_no_kernel_could_wait(tmp_path) -> None:
    with pytest.raises(JetExportError, match=r"--fuse-decode: not for inductor.*\nIt needs .*SM 9"):
        make_plan(options(tmp_path, fuse_decode=True))
    assert [has_dependent_launch({"device": "cuda", "arch": f"sm_{sm}"}) for sm in (80, 89, 90, 120)] == [0, 0, 1, 1]
    assert not has_dependent_launch({"device": "cpu", "arch": "x86_64"})
