"""benchmarks/kernels/sanitize.py: what counts as clean, with a stand-in for compute-sanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import kernel_problems
from helpers.kernel_problems import every_problem
from helpers.paths import BENCHMARKS
from helpers.scripts import load_script

SCRIPT = BENCHMARKS / "kernels/sanitize.py"


@pytest.fixture(scope="module")
def sanitize():
    return load_script("kernels/sanitize.py")


def tool(tmp_path: Path, text: str, status: int = 0) -> str:
    """A program in compute-sanitizer's place that prints this and exits so."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


RIGHT = "problem 2b attention decode: error 1.0e-03 ok\n"


@pytest.mark.parametrize(
    ("text", "status", "clean", "errors"),
    [
        (RIGHT + "========= ERROR SUMMARY: 0 errors", 0, True, 0),
        (RIGHT + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True, 0),
        (RIGHT + "========= ERROR SUMMARY: 3 errors", 9, False, 3),
        (RIGHT + "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 0, False, 2),
        ("problem x: error nan WRONG\n========= ERROR SUMMARY: 0 errors", 1, False, 0),
        ("problem x: error nan WRONG\n========= ERROR SUMMARY: 0 errors", 0, False, 0),
        ("========= ERROR SUMMARY: 0 errors", 0, False, 0),  # nothing ran
        (RIGHT, 0, False, 0),  # no summary
        (RIGHT + "========= ERROR SUMMARY: 0 errors", 139, False, 0),  # died at the end
    ],
)
def test_clean_means_counted_run_and_right(sanitize, tmp_path, text, status, clean, errors) -> None:
    r = sanitize.run_tool(tool(tmp_path, text, status), "memcheck", "", ["2b attention decode"], 60)
    assert (r["clean"], r["errors"]) == (clean, errors)
    assert bool(r["reports"]) == (not clean and "=========" in text)


def test_a_tool_that_hangs_is_not_clean(sanitize, tmp_path) -> None:
    path = tmp_path / "compute-sanitizer"
    path.write_text("#!/bin/sh\nexec sleep 30\n")
    path.chmod(0o755)
    r = sanitize.run_tool(str(path), "memcheck", "", ["a", "b"], 0.3)  # b has not begun
    assert r["unfinished"] == ["a", "b"] and not r["clean"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("dirty", [None, 0, 2])
def test_every_problem_has_to_be_clean(sanitize, tmp_path, dirty, processes) -> None:
    path = tmp_path / "compute-sanitizer"
    path.write_text(
        "#!/bin/sh\nfor last; do :; done\necho problem $last: error 1.0e-03 ok\n"
        f'[ $last = "{dirty}/3" ] && errors=1 || errors=0\necho "========= ERROR SUMMARY: $errors errors"\n'
    )
    path.chmod(0o755)
    r = sanitize.run_tool(str(path), "memcheck", "", ["a", "b", "c"], 60, processes)
    assert [p.split(":")[0] for p in r["problems"]] == ["0/3", "1/3", "2/3"]
    assert (r["clean"], r["errors"], r["unfinished"]) == ((True, 0, []) if dirty is None else (False, 1, []))


def test_names_come_in_the_problems_order(sanitize, monkeypatch, capsys) -> None:
    """Every problem runs, in two processes; what they print is in the order of one."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    in_order = list(every_problem("cpu"))
    assert sanitize.names_of("", 2, "cpu") == in_order and len(in_order) >= 10 and in_order[0].startswith("jet_block")


def script(*args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, env=env)


def test_what_cannot_run_says_so(tmp_path) -> None:
    missing = script(PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    if "comes with the CUDA toolkit" in missing.stderr:  # not where /usr/local/cuda has one
        assert missing.returncode == 2
    assert script("--tools", "valgrind").returncode == 2
    none = script("--processes", "0")
    assert none.returncode == 2 and none.stderr == "--processes 0: must be at least 1.\n"


def test_the_problems_run_on_a_cpu() -> None:
    done = script("--problems", "--device", "cpu", "--only", "gated_rms_norm")
    assert done.returncode == 0 and done.stdout.startswith("problem gated_rms_norm: error ")
    assert done.stdout.strip().endswith("ok")


def test_the_parts_are_the_whole(sanitize, monkeypatch, capsys) -> None:
    """Which problems a part holds; that they run is above."""
    monkeypatch.setattr(kernel_problems, "error_of", lambda problem: 0.0)

    def names(part: int, parts: int) -> set[str]:
        assert sanitize.run_problems("gemv", "cpu", False, part, parts) == 0
        return {line.rsplit(":", 1)[0] for line in capsys.readouterr().out.splitlines()}

    first, second, whole = names(0, 2), names(1, 2), names(0, 1)
    assert first and second and not first & second and first | second == whole
