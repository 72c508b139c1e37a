"""Scores from a proxy, a table or a callable, and the paper's table."""

import json
import math

import pytest
from helpers.fake_executor import SPACE, prepared, searched

from jet_export.bundle.memory import parameter_count
from jet_export.search.output import results_dict
from jet_export.search.run import run_search
from jet_export.search.scores import load_score, published
from jet_export.search.space import SPACES, read_space
from jet_export.search.terminal import plan_lines
from jet_export.utils.errors import JetExportError


def test_parameters_are_the_default(tmp_path) -> None:
    search = prepared(tmp_path, whole=0)
    searched(search)
    for e in search.state.evaluations.values():
        assert e.config is not None and e.score == parameter_count(e.config)


TABLES = {
    "s.toml": 'name = "recall"\nsource = "mine"\n[scores]\n"32x32x2" = 1.0\n"16x64x2" = 5\n',
    "s.json": json.dumps({"scores": {"32x32x2": 1.0, "16x64x2": 5}}),
    "s.csv": "sizes,score\n32x32x2,1.0\n16x64x2,5\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_scores_the_points_it_has(tmp_path, name: str) -> None:
    (tmp_path / name).write_text(TABLES[name])
    search = prepared(tmp_path, scores=str(tmp_path / name), whole=0)
    executor = searched(search)
    scores = {str(e.point.sizes[0]): e.score for e in search.state.evaluations.values()}
    assert scores == {"32x32x2": 1.0, "16x64x2": 5.0, "64x16x2": None, "16x32x4": None}
    missed = [e.missed for e in search.state.evaluations.values() if e.score is None]
    assert all("known" in (m or "") for m in missed)
    assert len(executor.builds) == 2 + 2 + 1  # nothing is built for points without a score


def test_sizes_of_attention_layers_are_not_scored(tmp_path) -> None:
    (tmp_path / "s.toml").write_text('[scores]\n"32x32x2" = 1.0\n"32x32x2+16x64x2" = 2.0\n"8x8x8" = 3.0\n')
    space = SPACE.replace(
        "[measure]", 'share = "each"\n[attention]\nlayout = ["ajja"]\n[constraints]\ncache_bytes = "none"\n[measure]'
    )
    search = prepared(tmp_path, space, scores=str(tmp_path / "s.toml"), whole=0)
    searched(search)
    scored = {e.label: e.score for e in search.state.evaluations.values() if e.score is not None}
    assert scored == {"32x32x2 ajja": 1.0, "32x32x2+16x64x2 ajja": 2.0}
    assert any("keys that match no point: 8x8x8" in line for line in plan_lines(search))
    assert results_dict(search)["score"]["unmatched"] == ["8x8x8"]


def test_engines_without_a_score_are_not_planned(tmp_path) -> None:
    (tmp_path / "s.toml").write_text('[scores]\n"32x32x2" = 1.0\n')
    search = prepared(tmp_path, scores=str(tmp_path / "s.toml"), whole=0)
    assert any(line.startswith("engines    4 of layers for 1 points") for line in plan_lines(search))
    assert len(searched(search).builds) == 4


@pytest.mark.parametrize("sampler", ["exact", "tpe"])
def test_a_table_of_other_points_is_refused(tmp_path, sampler: str) -> None:
    (tmp_path / "s.toml").write_text("[scores]\n" + "".join(f'"1x1x{n}" = 1.0\n' for n in range(1, 6)))
    search = prepared(tmp_path, scores=str(tmp_path / "s.toml"), sampler=sampler)
    with pytest.raises(
        JetExportError,
        match=r"s\.toml: no point has a score in it; its keys that match no point: 1x1x1, 1x1x2, 1x1x3 and 2 more",
    ):
        run_search(search, print)
    assert not search.spec.output.exists() and not search.spec.database_file.exists()


@pytest.mark.parametrize(
    "body", ["f = undefined", "raise ValueError", "raise SystemExit(3)", "1 / 0", "import no_such"]
)
def test_a_module_that_cannot_be_imported_is_named(tmp_path, body: str) -> None:
    (tmp_path / "mine.py").write_text(f"{body}\n")
    with pytest.raises(JetExportError, match=r"mine.py:f: cannot be imported \(\w+"):
        load_score(f"{tmp_path / 'mine.py'}:f")


def test_a_callable_scores(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("def heads(config, point):\n    return config.jet_dims(0).num_heads\n")
    search = prepared(tmp_path, scores=f"{tmp_path / 'mine.py'}:heads", whole=0)
    searched(search)
    assert {e.score for e in search.state.evaluations.values()} == {2.0, 4.0}
    assert search.spec.score.name == "heads"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.toml", "--scores nowhere.toml: no such file"),
        ("bad.toml", r"bad.toml: not a table of scores \(KeyError"),
        ("bad.json", r"bad.json: not a table of scores \(JSONDecodeError"),
        ("nan.toml", "nan.toml: the score of 16x16x1 is nan"),
        ("empty.toml", "empty.toml: holds no score"),
        ("nowhere.py:f", r"nowhere.py:f: cannot be imported"),
        ("json:no_such_name", r"json:no_such_name: cannot be imported"),
    ],
)
def test_an_unusable_score_is_named(tmp_path, monkeypatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("x = 1")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "nan.toml").write_text('[scores]\n"16x16x1" = nan')
    (tmp_path / "empty.toml").write_text("[scores]")
    with pytest.raises(JetExportError, match=message):
        load_score(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "raised ZeroDivisionError"),
        ("'high'", "returned 'high'"),
        ("exit(1)", "raised SystemExit"),
        ("10 ** 400", "not a finite number"),
    ],
)
def test_a_callable_that_fails_is_named(tmp_path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"def score(config, point):\n    return {body}\n")
    with pytest.raises(JetExportError, match=message):
        searched(prepared(tmp_path, scores=f"{tmp_path / 'mine.py'}:score"))


def test_the_papers_file_covers_its_table() -> None:
    from jet_export.model.presets import jet_2b

    rows, remarks = published()
    assert set(rows) == set(read_space(SPACES / "paper.toml", jet_2b()).sizes)
    assert remarks["cache_mb"] == 154 and "2508.15884" in remarks["source"]
    speeds = [row.throughput or math.nan for row in rows.values()]
    assert 100 * (max(speeds) / min(speeds) - 1) == pytest.approx(remarks["spread_percent"], abs=0.05)
    assert {str(dims): row.math for dims, row in rows.items()} == remarks["scores"]  # what `--scores paper` ranks by
