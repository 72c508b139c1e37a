"""Optuna's samplers over a space: every trial is a point of it, and a study can be resumed."""

import json
from typing import Any

import pytest
from helpers.fake_executor import SPACE, prepared, searched

from jet_export.search.points import all_points
from jet_export.search.sampling import choose_sampler
from jet_export.search.search import Search
from jet_export.utils.errors import JetExportError

PLACED = (
    SPACE + '[attention]\nlayout = {attn = [0, 1], swa = [1]}\n[precision]\nstate_dtype = ["float32", "bfloat16"]\n'
)


def trials(search: Search) -> list[Any]:
    return search.spec.study.open().get_trials()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_trials_are_points_of_the_space(tmp_path, sampler: str) -> None:
    search = prepared(tmp_path, PLACED, sampler=sampler, trials=8, whole=0)
    searched(search)
    assert len(trials(search)) == 8
    assert set(search.state.evaluations) <= set(all_points(search.spec.space, search.spec.preset))
    assert len(search.state.evaluations) > 3
    assert search.chosen is not None


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_no_trial_has_more_attention_than_layers(tmp_path, sampler: str) -> None:
    space = SPACE + "[attention]\nlayout = {attn = [1, 3], swa = 2}\n[constraints]\ncache_bytes = 'none'\n"
    search = prepared(tmp_path, space, sampler=sampler, trials=24, whole=0)
    searched(search)
    assert len(trials(search)) == 24
    assert set(search.state.evaluations) <= set(all_points(search.spec.space, search.spec.preset))


def test_the_grid_is_the_whole_space(tmp_path) -> None:
    search = prepared(tmp_path, SPACE, sampler="grid", trials=99, whole=0)
    searched(search)
    exact = prepared(tmp_path, SPACE, output=tmp_path / "exact", whole=0)
    searched(exact)
    assert set(search.state.evaluations) == set(exact.state.evaluations)
    assert search.chosen is not None and exact.chosen is not None
    assert search.chosen.point == exact.chosen.point


def test_a_killed_study_is_resumed(tmp_path) -> None:
    options: dict[str, Any] = {"sampler": "tpe", "trials": 10, "whole": 0, "jobs": 2}
    with pytest.raises(KeyboardInterrupt):
        searched(prepared(tmp_path, PLACED, **options), die_after=9)
    search = prepared(tmp_path, PLACED, resume=True, **options)
    searched(search)
    states = [t.state.name for t in trials(search)]
    assert states.count("COMPLETE") == 10
    left_open = [t.params for t in trials(search) if t.state.name == "FAIL"]
    assert left_open
    assert all(any(t.params == params for t in trials(search) if t.values) for params in left_open)
    assert not {"RUNNING", "WAITING"} & set(states)
    assert search.chosen is not None
    again = searched(prepared(tmp_path, PLACED, resume=True, **options))
    assert not again.builds


def test_refused_trials_say_why(tmp_path) -> None:
    space = PLACED.replace('"16x32x4"', '"128x128x8"')
    search = prepared(tmp_path, space, sampler="tpe", trials=8, whole=0)
    searched(search)
    refused = [t for t in trials(search) if t.state.name == "FAIL"]
    assert refused
    assert all("cache" in t.user_attrs["refused"] for t in refused)


def test_small_spaces_are_enumerated(tmp_path) -> None:
    search = prepared(tmp_path)
    assert search.spec.sampler == "exact"
    assert choose_sampler("auto", search.spec.space, search.spec.preset, 2) == "tpe"
    assert prepared(tmp_path, sampler="grid").spec.sampler == "grid"
    with pytest.raises(JetExportError, match=r"--sampler anneal: not known.\nKnown: auto, exact, grid, tpe, nsga2"):
        prepared(tmp_path, sampler="anneal")
    with pytest.raises(JetExportError, match="--sampler grid: cannot search layouts under a count"):
        prepared(tmp_path, PLACED, sampler="grid")
    more = 'share = "each"\n[precision]\nstate_dtype = ["float32", "bfloat16"]\n[attention]\nlayout = ["jjjj"]\n'
    many = SPACE.replace("[measure]", more + "[measure]")
    many = many.replace('"32x32x2"', '"32x32x2", "32x16x2", "16x16x2", "16x48x2", "48x16x2"')
    with pytest.raises(JetExportError, match=r"--sampler exact: the space has [\d,]+ points"):
        prepared(tmp_path, many, sampler="exact")


def test_a_damaged_study_is_one_message(tmp_path) -> None:
    search = prepared(tmp_path, PLACED, sampler="tpe", trials=4)
    search.spec.output.mkdir()
    (search.spec.output / "search.json").write_text(json.dumps(search.spec.identity()))
    (search.spec.output / "study.db").write_text("not a study " * 99)
    with pytest.raises(JetExportError, match=r"study.db: not a usable Optuna study .*\n.*mv "):
        searched(prepared(tmp_path, PLACED, sampler="tpe", trials=4, resume=True))


def test_searches_share_a_study_in_a_database(tmp_path) -> None:
    """The second goes on where the first is, sees its points, and leaves what the first still runs alone."""
    options: dict[str, Any] = {"sampler": "tpe", "whole": 0, "storage": f"sqlite:///{tmp_path}/shared.db"}
    first = prepared(tmp_path, PLACED, trials=4, output=tmp_path / "a", **options)
    searched(first)
    running = first.spec.study.open().ask()
    second = prepared(tmp_path, PLACED, trials=7, output=tmp_path / "b", database=tmp_path / "b.db", **options)
    searched(second)
    states = {t.number: t.state.name for t in trials(second)}
    assert states.pop(running.number) == "RUNNING" and list(states.values()) == ["COMPLETE"] * 7
    assert set(first.state.evaluations) <= set(second.state.evaluations)
    assert not (tmp_path / "a" / "study.db").exists()


def test_a_password_is_shown_nowhere(tmp_path) -> None:
    url = "postgresql://me:secret@nowhere.invalid:5432/optuna"
    search = prepared(tmp_path, PLACED, sampler="tpe", trials=1, storage=url)
    assert "secret" not in json.dumps(search.spec.options.record())
    with pytest.raises(JetExportError, match="not a usable Optuna study") as e:
        search.spec.study.open()
    assert "postgresql://me:***@nowhere.invalid:5432/optuna" in str(e.value) and "secret" not in str(e.value)
