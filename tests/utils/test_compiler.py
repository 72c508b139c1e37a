"""$CXX: one word, several words, empty, and invalid."""

import shutil
import subprocess
from pathlib import Path

import pytest

from jet_export.utils.compiler import Compiler, find_compiler
from jet_export.utils.errors import JetExportError

GXX = shutil.which("g++") or ""
needs_gxx = pytest.mark.skipif(not GXX, reason="needs g++")


@needs_gxx
@pytest.mark.parametrize("value", [None, "", "  "])
def test_unset_and_empty_mean_gxx(monkeypatch, value) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if value is not None:
        monkeypatch.setenv("CXX", value)
    assert find_compiler("a test") == Compiler((GXX,))


@needs_gxx
def test_several_words_run_as_one_executable(monkeypatch, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho called >>{tmp_path}/log\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"{launcher} g++")
    compiler = find_compiler("a test")
    assert compiler.words == (str(launcher), "g++") and "g++" in compiler.version()
    before = len((tmp_path / "log").read_text().splitlines())
    with compiler.executable() as path:
        assert Path(path).name == "g++"
        (tmp_path / "a.cpp").write_text("int f() { return 1; }\n")
        subprocess.run([path, "-c", "a.cpp", "-o", "a b.o"], cwd=tmp_path, check=True)
    assert (tmp_path / "a b.o").is_file() and not Path(path).exists()
    assert len((tmp_path / "log").read_text().splitlines()) == before + 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no-such-compiler -O1", r"no-such-compiler is not on the PATH, and a test is compiled with it"),
        ("g++ '", r"CXX=g\+\+ ': No closing quotation"),
    ],
)
def test_an_invalid_compiler_is_one_message(monkeypatch, value, message) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(JetExportError, match=message):
        find_compiler("a test")
