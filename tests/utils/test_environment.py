"""What a result is measured with: above all the commit, which is our own checkout's or unknown."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

import jet_export
from jet_export.utils.environment import environment, source_commit, version_lines, write_result

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture(autouse=True)
def no_commit_given(monkeypatch) -> None:
    monkeypatch.delenv("JET_COMMIT", raising=False)


def git(directory: Path, *words: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=x", "-c", "user.email=x@x", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@needs_git
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path) -> None:
    """Wherever the process runs, and whichever repository git's variables name."""
    commit = git(ROOT, "rev-parse", "--short", "HEAD")
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert source_commit() == commit and environment()["commit"] == commit


def test_a_given_commit_is_taken(monkeypatch) -> None:
    monkeypatch.setenv("JET_COMMIT", "abc123")
    assert source_commit() == "abc123" and environment()["commit"] == "abc123"
    assert version_lines()[0].endswith("(commit abc123)")


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment()
    assert found["commit"] == "unknown" and found["driver"] == "unknown"
    assert all(found.values())


@needs_git
@pytest.mark.parametrize("folder", [".", "lib"])
def test_an_installed_copy_inside_another_repository_has_no_commit(tmp_path, folder) -> None:
    """Neither in the repository's root nor below it."""
    site = tmp_path / "other" / folder
    shutil.copytree(Path(jet_export.__file__).parent / "utils", site / "jet_export" / "utils")
    shutil.copy(jet_export.__file__, site / "jet_export")
    (tmp_path / "other" / "pyproject.toml").write_text('[project]\nname = "other"\n')
    git(tmp_path / "other", "init")
    git(tmp_path / "other", "add", ".")
    git(tmp_path / "other", "commit", "-m", "theirs")
    code = "from jet_export.utils import environment as e; print(e.__file__, e.environment()['commit'], sep='\\n')"
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=site, capture_output=True, text=True, check=True)
    file, commit = done.stdout.split()
    assert Path(file).is_relative_to(site) and commit == "unknown"


def test_a_result_says_how_it_was_made_without_paths_of_the_machine(tmp_path, monkeypatch) -> None:
    argv = [f"{ROOT}/benchmarks/kernels/gemv.py", "/data/bundles/jet-2b", "--output", f"{ROOT}/out", "--rows", "a b"]
    monkeypatch.setattr(sys, "argv", argv)
    write_result(tmp_path / "x" / "r.json", {"rows": []})
    result = json.loads((tmp_path / "x" / "r.json").read_text())
    assert result["command"] == "python benchmarks/kernels/gemv.py jet-2b --output out --rows 'a b'"
    write_result(tmp_path / "r.json", {"command": "jet-export build"})
    assert json.loads((tmp_path / "r.json").read_text())["command"] == "jet-export build"
