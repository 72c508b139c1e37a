"""Candidates side by side: the results of one after the other; stopped and gone on with; an error, a death in one."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.retrofits import ALONE

from jet_export.postnas import run
from jet_export.postnas.candidate import SPEED, Candidate, run_candidates
from jet_export.postnas.parallel import Workers
from jet_export.postnas.recipe import BudgetRecipe, PostnasRecipe
from jet_export.postnas.run import run_postnas
from jet_export.postnas.session import Job, Session, Stopped
from jet_export.training.distributed import processes
from jet_export.training.stop import Stop
from jet_export.utils.errors import JetExportError

BUDGET = BudgetRecipe(feature_steps=2, logits_steps=1)
CANDIDATES = [Candidate(name=name, directory=name, layers=name) for name in ("jjj", "ajj", "jjj", "jja")]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with closing(Workers(2)) as both:
        yield both


@pytest.fixture
def session(recipe: PostnasRecipe, teacher_directory: Path, tmp_path: Path, workers: Workers) -> Iterator[Session]:
    made = replace(recipe, training=replace(recipe.training, teacher=str(teacher_directory)))
    with processes("cpu") as group:
        yield Session(made, group, tmp_path, tmp_path / "step", "cpu", Stop(), print, workers=workers)


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != SPEED} for row in rows]


def test_results_are_those_of_one_after_the_other_stopped_or_not(
    session: Session, recipe: PostnasRecipe, tmp_path: Path
) -> None:
    """Stopped after a step; then no step is trained again, nor a candidate that comes twice."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        session.stop.asked |= " step 1/" in line

    session.say = say
    with pytest.raises(Stopped):
        run_candidates(session, CANDIDATES, BUDGET)
    session.stop, session.say = Stop(), said.append
    rows = run_candidates(session, CANDIDATES, BUDGET)
    assert {line[:3] for line in said} == {"[0]", "[1]"}
    assert sum("]   step " in line for line in said) == 3 * 3
    one_by_one = replace(session, directory=tmp_path / "alone", workers=None)
    assert without_speed(rows) == without_speed(run_candidates(one_by_one, CANDIDATES, BUDGET))


def write(session: Session, path: Path, number: int) -> None:
    session.say(f"job {number}, {type(session.group).__name__} of {session.group.world}")
    path.write_text(json.dumps({"number": number, "threads": torch.get_num_threads(), "process": os.getpid()}))


def fails(session: Session, e: Exception) -> None:
    raise e


def dies(session: Session) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def waits(session: Session, path: Path) -> None:
    path.write_text("{}")
    while True:
        session.check_stop()


def numbered(directory: Path, count: int) -> list[Job]:
    paths = [directory / f"{i}.json" for i in range(count)]
    return [Job(path, partial(write, path=path, number=i)) for i, path in enumerate(paths)]


def test_processes_stay_and_have_the_callers_threads(session: Session, tmp_path: Path) -> None:
    rows = session.each(numbered(tmp_path, 2)) + session.each([*numbered(tmp_path / "..", 3)][2:])
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert {row["threads"] for row in rows} == {torch.get_num_threads()}
    assert len({row["process"] for row in rows}) == 2


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (partial(fails, e=JetExportError("no such thing.", "Find it.")), "no such thing.\nFind it."),
        (dies, r"--parallel 2: process \[0\] died \(status -9\).\nWhat is done stays: go on by --resume"),
    ],
)  # fmt: skip
def test_an_error_in_one_stops_the_others_and_leaves_no_process(
    session: Session, tmp_path: Path, job: Callable[[Session], None], message: str
) -> None:
    others = numbered(tmp_path, 9)
    with pytest.raises(JetExportError, match=message):
        session.each(
            [Job(tmp_path / "none", job), Job(tmp_path / "long", partial(waits, path=tmp_path / "w")), *others]
        )
    assert not (tmp_path / "8.json").exists()
    assert not multiprocessing.active_children()


def test_it_is_refused_beside_torchrun(recipe: PostnasRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "processes", lambda device: nullcontext(replace(ALONE, world=2)))
    with pytest.raises(JetExportError, match=r"--parallel 3: torchrun has begun 2 processes.\nUse one or the other"):
        run_postnas(recipe, tmp_path, parallel=3, emit=print)
