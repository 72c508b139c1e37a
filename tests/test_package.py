"""What users install: the wheel, made from the sdist, works without the checkout, and holds what it says."""

import email
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.bundles import tiny_bundle
from helpers.installed import Installed, distribution
from helpers.paths import ROOT

from jet_export.utils.version import __version__

pytest.importorskip("build", reason="the package `build` is not installed")


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    return distribution(tmp_path_factory)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory)


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


def test_it_builds_verifies_and_generates(installed, tmp_path_factory) -> None:
    """It has built the bundle that other tests use."""
    bundle, text = str(tiny_bundle(tmp_path_factory)), tmp_path_factory.mktemp("text") / "heldout.txt"
    text.write_text((ROOT / "jet_export/data/heldout.txt").read_text(encoding="utf-8")[:600], encoding="utf-8")
    # Without recall and probes, and with little text, which take most of its time: tests/verify has them.
    quick = (
        "import jet_export.verify.quality as q, jet_export.verify.verify as v; q.recall = lambda *_: {}; "
        "v.run_probes = lambda *_: []; from jet_export.cli.app import main; main()"
    )
    verified = installed("python", "-c", quick, "verify", bundle, "--text", str(text))
    assert verified.returncode == 0 and "PASSED" in verified.stdout, verified.stdout + verified.stderr
    generated = installed("jet-export", "generate", bundle, "--prompt", "def ", "--max-new-tokens", "4")
    assert generated.returncode == 0 and "[4 tokens" in generated.stdout + generated.stderr, generated.stderr
