"""--sm, --tensorrt-headers and --fetch-headers: their meaning, and one message for each invalid use."""

import fcntl
import json
import os
import stat
from pathlib import Path

import pytest

from jet_export.build.plan import BuildOptions, plugin_sms
from jet_export.plugins import headers, library
from jet_export.plugins.headers import find_headers
from jet_export.plugins.targets import SHARED, check_fp8, parse_sms, sm_of_arch
from jet_export.utils.compiler import find_compiler
from jet_export.utils.errors import JetExportError


def test_sms_are_read_sorted_and_once():
    assert parse_sms("9.0, 8.0,8.9,8.9") == (80, 89, 90)
    assert parse_sms("12.0") == (120,) and set(SHARED) >= {80, 89, 90, 120}


@pytest.mark.parametrize(
    "text, message",
    [
        ("90", r"--sm 90: '90' is no compute capability.\nWrite them like --sm 8.9,9.0"),
        ("", r"'' is no compute capability"),
        ("8.9,", r"'' is no compute capability"),
        ("sm_90", r"'sm_90' is no compute capability"),
        ("8.95", r"'8.95' is no compute capability"),
        ("8.9,7.0", r"--sm 8.9,7.0: SM 7.0 is not known here.\nKnown: 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 12.0."),
    ],
)
def test_an_invalid_sm_is_refused(text, message):
    with pytest.raises(JetExportError, match=message):
        parse_sms(text)


def test_an_arch_names_its_sm():
    assert [sm_of_arch(arch) for arch in ("sm_90", "sm_120", "x86_64", "aarch64")] == [90, 120, None, None]


def options(**values) -> BuildOptions:
    return BuildOptions(model="jet-tiny", **values)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_builds_target_is_the_default(backend):
    assert plugin_sms(options(), backend, "sm_90") == (90,)
    assert plugin_sms(options(sm="8.0,9.0"), backend, "sm_90") == (80, 90)
    assert plugin_sms(options(sm="8.9"), backend, "x86_64") == (89,)
    assert plugin_sms(options(), "inductor", "sm_90") == ()
    with pytest.raises(JetExportError, match=r"no GPU here, so the architecture .*\nPass --sm, e.g. --sm 8.9"):
        plugin_sms(options(), backend, "x86_64")


@pytest.mark.parametrize(
    "given, flag",
    [
        ({"sm": "8.9"}, "--sm"),
        ({"tensorrt_headers": Path("x")}, "--tensorrt-headers"),
        ({"fetch_headers": True}, "--fetch-headers"),
    ],
)
@pytest.mark.parametrize("backend", ["inductor", "onnx"])
def test_a_backend_without_plugins_refuses_their_options(given, flag, backend):
    with pytest.raises(JetExportError, match=f"{flag}: the {backend} backend has no plugin library.\nLeave it out"):
        plugin_sms(options(**given), backend, "sm_90")


def test_fp8_needs_ada():
    check_fp8((89, 90, 120), "--fp8")
    with pytest.raises(JetExportError, match=r"--fp8: SM 8.0, 8.6 has no FP8 .* 8.9 or newer.\nLeave them out of --sm"):
        plugin_sms(options(sm="8.0,8.6,9.0", fp8=True), "tensorrt", "sm_90")
    with pytest.raises(JetExportError, match=r"--kv-cache-dtype fp8: SM 8.0 has no FP8 .*\nLeave it out of --sm"):
        plugin_sms(options(kv_cache_dtype="fp8"), "tensorrt", "sm_80")


def folder_of_headers(at: Path) -> Path:
    at.mkdir(parents=True)
    (at / "NvInferRuntime.h").touch()
    return at


def test_headers_are_fetched_only_when_asked_for(monkeypatch, tmp_path):
    asked = []

    def fetch_headers(emit) -> Path:
        asked.append(emit)
        return tmp_path

    monkeypatch.setenv("JET_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(headers, "installed_headers", lambda: None)
    monkeypatch.setattr(headers, "fetch_headers", fetch_headers)
    with pytest.raises(JetExportError, match=r"were not found.*\n.*development package, .*DIR.*--fetch-headers"):
        headers.headers_for(None, fetch=False)
    given = folder_of_headers(tmp_path / "given")
    assert headers.headers_for(given, fetch=True) == given and not asked
    assert headers.headers_for(None, fetch=True) == tmp_path and len(asked) == 1
    installed = folder_of_headers(tmp_path / "installed")
    monkeypatch.setattr(headers, "installed_headers", lambda: installed)
    assert headers.headers_for(None, fetch=True) == installed and len(asked) == 1


def test_source_and_licence_are_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("JET_EXPORT_CACHE", str(tmp_path))
    folder_of_headers(headers.fetched_headers())
    lines: list[str] = []
    headers.fetch_headers(lines.append)
    text = "\n".join(lines)
    assert headers.WHEEL in text and headers.SHA256 in text and "Apache-2.0" in text


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_compiler_that_is_too_old_is_reported(monkeypatch, tmp_path):
    old = script(tmp_path / "old-g++", 'echo "error: unrecognized command line option -std=c++17" >&2; exit 1')
    monkeypatch.setenv("CXX", old)
    with pytest.raises(JetExportError, match=r"old-g\+\+ does not compile C\+\+17: error: unrecog.*\nInstall g\+\+ 7"):
        find_compiler(library.PURPOSE)
    with pytest.raises(JetExportError, match=r"does not compile C\+\+17"):
        library.require_tools(None, fetch=True)


def test_progress_estimates_the_time_left():
    assert library.with_eta("[3/9] a_kernel", 6.0) == "[3/9] a_kernel: 6 s, about 12 s left"
    assert library.with_eta("[9/9] a_kernel", 18.0) == "[9/9] a_kernel: 18 s"
    assert library.with_eta("a warning", 1.0) == "a warning"


def test_the_second_process_waits_and_finds_the_library_built(monkeypatch, headers, tmp_path):
    """The library appears while waiting for the lock: nothing is compiled a second time."""
    monkeypatch.setattr(library, "build_into", lambda *args: pytest.fail("compiled again"))
    include, compiler = find_headers(headers), find_compiler(library.PURPOSE)
    spec = json.dumps({"cases": [], "sms": [90]}, sort_keys=True)
    folder = tmp_path / f"plugins-{library.digest(spec, include, compiler)}"
    real, waited = fcntl.flock, []

    def flock(lock, how):
        if how & fcntl.LOCK_NB:
            raise BlockingIOError
        folder.mkdir()
        (folder / library.NAME).touch()
        waited.append(how)
        real(lock, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lines: list[str] = []
    assert library.build_library([], [90], include, cache=tmp_path, emit=lines.append) == folder
    assert waited and lines == ["another process is building this plugin library: waiting for it"]
    assert os.listdir(tmp_path) == [folder.name]
