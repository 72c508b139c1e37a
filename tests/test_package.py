"""What users install: the wheel, made from the sdist, works without the checkout, and holds what it says."""

import email
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.paths import ROOT

from jet_export.utils.version import __version__

pytest.importorskip("build", reason="the package `build` is not installed")

LAYERS = {"layer_types": ["jet"], "num_hidden_layers": 1, "max_window_layers": 1}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of the sdist and of the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a fresh environment with the wheel, outside of the tree. The environment's other packages are
    this one's, whose editable install of the checkout it does not see."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    python = folder / "env/bin/python"
    wheel = next(dist.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True)
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        return subprocess.run([str(folder / "env/bin" / command[0]), *command[1:]], **options)

    return run


def test_the_licences_are_declared_and_in_both(dist) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        about = email.message_from_bytes(wheel.read(f"jet_export-{__version__}.dist-info/METADATA"))
    assert about["License-Expression"] == "Apache-2.0 AND PSF-2.0" and about["Version"] == __version__
    assert set(about.get_all("License-File") or []) == {"LICENSE", "jet_export/data/LICENSE-PSF.txt"}
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        inside = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert {"LICENSE", "jet_export/data/LICENSE-PSF.txt", "pyproject.toml", "README.md"} <= inside
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]


def test_the_wheel_holds_every_file_of_the_packages(dist) -> None:
    """All that git knows under them, where it is imported from."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = {"jet_export/": "jet_export/", **{f"{p}/": f"jet_export/{p}/" for p in ("kernels", "model", "plugins")}}
    wanted = {
        f"{place}{name.removeprefix(folder)}"
        for folder, place in places.items()
        for name in listed.stdout.splitlines()
        if name.startswith(folder) and (ROOT / name).is_file()
    }
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        missing = wanted - set(wheel.namelist())
    assert missing <= {"jet_export/plugins/README.md"}


def test_it_runs_outside_of_the_tree(installed) -> None:
    names = ("jet_export", "jet_export.kernels", "jet_export.model", "jet_export.plugins")
    code = f"import sys, importlib as i; print([i.import_module(n).__file__.startswith(sys.prefix) for n in {names}])"
    where = installed("python", "-c", code)
    assert where.stdout.strip() == "[True, True, True, True]", where.stderr
    version = installed("jet-export", "--version")
    assert version.stdout.startswith(f"jet-export {__version__} (commit unknown)"), version.stderr
    most = installed("jet-export", "inspect", "--model", "jet-2b", "--fp8", "--context", "65536", "--tpot-ms", "20")
    assert "largest batch within 20 ms a token" in most.stdout, most.stderr


def test_it_builds_verifies_and_generates(installed, tmp_path) -> None:
    """jet-tiny's architecture with fewer layers: what compiles once compiles often."""
    config = json.loads((ROOT / "jet_export/data/jet-tiny/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **LAYERS}))
    bundle = str(tmp_path / "bundle")
    limits = ("--max-batch-size", "2", "--max-seq-len", "256", "--prefill-chunk", "64")
    tokenizer = str(ROOT / "jet_export/data/jet-tiny")
    weights = ("--random-weights", "--tokenizer", tokenizer)
    built = installed("jet-export", "build", "--model", str(tmp_path), *weights, *limits, "--output", bundle)
    assert built.returncode == 0, built.stderr[-3000:]
    verified = installed("jet-export", "verify", bundle)
    assert verified.returncode == 0 and "PASSED" in verified.stdout, verified.stdout + verified.stderr
    generated = installed("jet-export", "generate", bundle, "--prompt", "def ", "--max-new-tokens", "4")
    assert generated.returncode == 0 and "[4 tokens" in generated.stdout + generated.stderr, generated.stderr
