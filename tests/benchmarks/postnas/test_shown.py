"""benchmarks/postnas: the plan, the state that travels between calls, and calls that go on with it."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.scripts import load_script

driver = load_script("postnas/driver.py")
plan = load_script("postnas/plan.py")
scale = load_script("postnas/scale.py")
state = load_script("postnas/state.py")


def quiet(line: str) -> None: ...


def pieces(seeds: int = 3) -> list[Any]:
    s = scale.recipes(Path("runs/shown"), toy=False)
    found: list[Any] = plan.plan(s.postnas, s.teacher, s.layers, seeds)
    return found


def test_the_plan_fits_ninety_minutes_with_a_quarter_in_reserve() -> None:
    work, longest = sum(p.seconds for p in pieces()), max(p.unit for p in pieces())
    calls = -(-work // (8 * 60 - driver.SAVING - plan.CALL))
    assert work + calls * (plan.CALL + driver.SAVING) < 0.8 * 90 * 60
    assert longest < 8 * 60 - driver.SAVING - plan.CALL, "a part that no call of 8 minutes ends"


def test_a_piece_needs_only_earlier_ones() -> None:
    names = [p.name for p in pieces()]
    assert len(set(names)) == len(names)
    assert all(names.index(need) < names.index(p.name) for p in pieces() for need in p.needs)
    assert sum(p.seconds for p in pieces(seeds=1)) < sum(p.seconds for p in pieces(seeds=3))


def test_what_is_left_is_predicted_by_the_phase_that_was_seen() -> None:
    known = {p.name: p for p in pieces()}
    seconds = {"teacher-1": 2 * known["teacher-1"].seconds, "truth": 3 * known["truth"].seconds, "compare": 7.0}
    longer = plan.ratios(known.values(), seconds, ["teacher-1", "truth"])
    assert longer(known["teacher-2"]) == pytest.approx(2)
    assert longer(known["compare"]) == longer(known["design"]) == pytest.approx(3)
    assert 2 < longer(known["engine"]) < 3
    assert plan.ratios(known.values(), {}, [])(known["engine"]) == 1


def test_a_candidate_beside_others_takes_as_long_as_all_of_them_once_that_was_seen() -> None:
    known = {p.name: p for p in pieces()}
    assert plan.smallest(known["truth"], 2.0, 4, seen=False) == 2 * known["truth"].unit
    assert plan.smallest(known["compare"], 0.5, 4, seen=True) == 2 * known["compare"].unit
    assert plan.smallest(known["retrofit"], 2.0, 4, seen=True) == 2 * known["retrofit"].unit


def fill(run: Path, calls: int) -> None:
    """A run's directory with what travels and what does not."""
    for name, size in {
        "teacher/model.safetensors": 3000,
        "pieces/teacher-1.json": 10,
        "cache/triton/kernel": 10,
        "data/train.jsonl": 10,
        "random/model.safetensors": 10,
        "teacher-run/checkpoints/step-00000004/__0_0.distcp": 500,
        "run/.block/jet-0/checkpoints/step-00000004/__0_0.distcp": 5000,
        "run/placement/result.json": 10,
        "run/placement/supernet/checkpoints/step-00000004/__0_0.distcp": 10,
    }.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(bytes(i * 73 % 251 for i in range(size)))
    state.Progress(calls=calls, done=["teacher-1"]).write(run)


def test_state_travels_in_parts_without_what_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "PART_BYTES", 300)
    monkeypatch.setattr(state, "CHECKPOINT_BYTES", 1000)
    fill(tmp_path / "run", calls=2)
    said: list[str] = []
    state.pack(tmp_path / "run", tmp_path / "state", said.append)
    found = state.parts(tmp_path / "state")
    assert len(found) > 1 and all(p.stat().st_size <= 300 for p in found)
    assert any("run/.block/jet-0/checkpoints/step-00000004" in line for line in said)
    assert state.unpack(tmp_path / "state", tmp_path / "new")
    files = {p.relative_to(tmp_path / "new").as_posix() for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert files == {
        "progress.json",
        "teacher/model.safetensors",
        "pieces/teacher-1.json",
        "cache/triton/kernel",
        "teacher-run/checkpoints/step-00000004/__0_0.distcp",
        "run/placement/result.json",
    }
    assert all((tmp_path / "new" / f).read_bytes() == (tmp_path / "run" / f).read_bytes() for f in files)
    fill(tmp_path / "run", calls=3)
    assert not state.unpack(tmp_path / "state", tmp_path / "run"), "older than what is there"
    assert not state.unpack(tmp_path / "nothing", tmp_path / "run")


def call(output: Path, only: str, **options: Any) -> int:
    args = {
        "output": output, "minutes": 60.0, "corpus": Path(), "state": None, "save": None, "only": only, "skip": "",
        "seeds": 1, "rows": 1, "device": "cpu", "plan": False, "toy": True, "parallel": 1, "eager": False,
    }  # fmt: skip
    namespace = argparse.Namespace(**{**args, **options})
    status: int = driver.Call(namespace, time.monotonic() + 60 * namespace.minutes).run()
    return status


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of jet-tiny's corpus, which this Python's library is not."""

    def prepare(output: Path, *_: Any) -> None:
        output.mkdir(parents=True)
        for name in ("train", "recall", "heldout-code"):
            lines = [json.dumps({"text": f"def {name}_{i}(x):\n    return x + {i}\n" * 8}) for i in range(4)]
            (output / f"{name}.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(driver, "prepare", prepare)


def test_a_call_goes_on_elsewhere_and_ends_as_one_does(tmp_path: Path, data: None) -> None:
    assert call(tmp_path / "whole", "teacher-1,teacher-2,teacher-3") == 0
    assert call(tmp_path / "a", "teacher-1", save=tmp_path / "state") == 0
    assert call(tmp_path / "b", "teacher-1,teacher-2,teacher-3", state=tmp_path / "state") == 0
    progress = json.loads((tmp_path / "b/progress.json").read_text())
    assert progress["calls"] == 2 and progress["done"] == ["teacher-1", "teacher-2", "teacher-3"]
    weights = [(tmp_path / run / "teacher/model.safetensors").read_bytes() for run in ("whole", "b")]
    assert weights[0] == weights[1]
    assert len(progress["history"]) == 2 and {"seconds", "commit", "parallel"} == progress["history"][0].keys()
    shown = json.loads((tmp_path / "b/shown.json").read_text())
    assert [(t["training"], t["stage"], t["steps"]) for t in shown["trainings"]] == [
        ("teacher-run", f"teacher-{i}", 4) for i in (1, 2, 3)
    ]
    assert all(t["seconds"] >= t["first_step_seconds"] > 0 < t["tokens_per_s"] for t in shown["trainings"])
    assert "| teacher-3 | 4 steps of 256 tokens |" in (tmp_path / "b/shown.md").read_text()


def test_a_call_without_time_begins_nothing_and_one_that_fails_says_so(
    tmp_path: Path, data: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path / "run", "teacher-1", minutes=0.0) == 0
    assert "teacher-1: not begun: 4 s at least" in capsys.readouterr().out

    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(driver, "train_stage", fails)
    assert call(tmp_path / "run", "teacher-1") == 1
    assert "failed: RuntimeError: no such kernel" in (tmp_path / "run/shown.md").read_text()
    assert not (tmp_path / "run/pieces/teacher-1.json").exists()
