"""benchmarks/tools/gpu_session.py: a step that fails or hangs does not stop the others; the next call goes on."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import BENCHMARKS
from helpers.scripts import load_script

SCRIPT = BENCHMARKS / "tools/gpu_session.py"


@pytest.fixture(scope="module")
def session():
    return load_script("tools/gpu_session.py")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def counting(tmp_path: Path, name: str, code: str = "") -> list[str]:
    """A command that leaves a mark each time it runs."""
    return python(f"open({str(tmp_path / name)!r}, 'a').write('x'); {code}")


def test_one_failing_step_does_not_stop_the_others_and_is_tried_again(session, tmp_path) -> None:
    steps = [
        session.Step("a", "", 60, {"one": counting(tmp_path, "a", "raise SystemExit(3)")}),
        session.Step("b", "", 60, {"one": counting(tmp_path, "b")}),
        session.Step("c", "", 60, {"one": counting(tmp_path, "c")}, needs=(tmp_path / "none" / "manifest.json",)),
    ]
    out = tmp_path / "out"
    done = session.run_session(steps, out, 1, again=False)
    assert [done[n].status for n in "abc"] == ["failed", "passed", "not run: none is missing"]
    assert done["a"].exit_status == {"one": 3}
    session.run_session(steps, out, 1, again=False)
    assert (tmp_path / "a").read_text() == "xx" and (tmp_path / "b").read_text() == "x"
    session.run_session(steps[1:2], out, 1, again=True)
    assert (tmp_path / "b").read_text() == "xx" and not (tmp_path / "c").exists()
    kept = json.loads((out / "session.json").read_text())
    assert {n: s["status"] for n, s in kept["steps"].items()} == {n: done[n].status for n in "abc"}
    assert "gpu" in kept["environment"] and (out / "logs" / "a-one.log").read_text().startswith("$ ")


def test_a_hanging_step_is_killed_with_its_children(session, tmp_path) -> None:
    child = f"import subprocess; subprocess.run({python('import time; time.sleep(60)')!r})"
    begin = time.monotonic()
    outcome = session.run_step(session.Step("h", "", 1, {"one": python(child), "two": python("")}), tmp_path, 1.0)
    assert outcome.status == "timed out" and outcome.exit_status == {"one": None, "two": 0}
    assert time.monotonic() - begin < 20


def test_commands_of_a_step_run_side_by_side(session, tmp_path) -> None:
    waits = {
        n: python(
            f"import pathlib, time\nopen({str(tmp_path / n)!r}, 'w')\n"
            f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.01)"
        )
        for n, other in (("one", "two"), ("two", "one"))
    }
    assert session.run_step(session.Step("s", "", 60, waits), tmp_path / "logs", 60).status == "passed"


def test_no_step_begins_without_time(session, tmp_path) -> None:
    steps = [session.Step("a", "", 60, {"one": counting(tmp_path, "a")})]
    assert session.run_session(steps, tmp_path / "out", 0.001, again=False)["a"].status == "not run: no time left"
    assert not (tmp_path / "a").exists()


def test_every_command_is_one_that_exists(session, tmp_path, monkeypatch) -> None:
    """Scripts are there and take these options; subcommands and their options are the command line's."""
    import typer

    from jet_export.cli import app as cli

    program: Any = typer.main.get_command(cli.app)
    commands = program.commands
    for step in session.steps(tmp_path / "out", tmp_path / "bundles"):
        for command in step.commands.values():
            options = [w for w in command if w.startswith("--")]
            if command[1:3] == ["-m", "jet_export.cli.app"]:
                known = {o for p in commands[command[3]].params for o in p.opts}
            elif command[1] == "-m":
                continue
            else:
                text = Path(command[1]).read_text()
                if "parser_of(" in text:
                    text += (BENCHMARKS / "kernels/arguments.py").read_text()
                if "serving_options" in text:
                    text += (BENCHMARKS / "serving/serving_options.py").read_text()
                known = {o for o in options if f'"{o}"' in text}
            assert set(options) <= known, command


def test_an_unknown_step_is_refused() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--only", "coffee"], capture_output=True, text=True)
    assert done.returncode == 2 and "--only coffee: no such step. Known: tests, goldens, accuracy" in done.stderr
