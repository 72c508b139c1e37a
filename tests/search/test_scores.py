"""Quality from a proxy, a table or a callable; and the paper's file, which claims nothing that it does not hold."""

import json

import pytest
from fake_hands import prepared, searched

from jet_export.errors import JetExportError
from jet_export.memory import parameter_count
from jet_export.search.scores import load_score, published
from jet_export.search.space import SPACES, read_space


def test_parameters_are_the_default(tmp_path) -> None:
    search = prepared(tmp_path, whole=0)
    searched(search)
    for e in search.evaluations.values():
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
    hands = searched(search)
    scores = {str(e.point.sizes[0]): e.score for e in search.evaluations.values()}
    assert scores == {"32x32x2": 1.0, "16x64x2": 5.0, "64x16x2": None, "16x32x4": None}
    missed = [e.missed for e in search.evaluations.values() if e.score is None]
    assert all("known" in (m or "") for m in missed)
    assert len(hands.builds) == 2 + 2 + 1  # nothing is built for points without a score


def test_a_callable_scores(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("def heads(config, point):\n    return config.jet_dims(0).num_heads\n")
    search = prepared(tmp_path, scores=f"{tmp_path / 'mine.py'}:heads", whole=0)
    searched(search)
    assert {e.score for e in search.evaluations.values()} == {2.0, 4.0}
    assert search.score.name == "heads"


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


@pytest.mark.parametrize(("body", "message"), [("1 / 0", "raised ZeroDivisionError"), ("'high'", "returned 'high'")])
def test_a_callable_that_fails_is_named(tmp_path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"def score(config, point):\n    return {body}\n")
    with pytest.raises(JetExportError, match=message):
        searched(prepared(tmp_path, scores=f"{tmp_path / 'mine.py'}:score"))


def test_the_papers_file_covers_its_table() -> None:
    from jet_export.model.config import jet_2b

    rows, remarks = published()
    assert set(rows) == set(read_space(SPACES / "paper.toml", jet_2b()).sizes)
    assert remarks["cache_mb"] == 154 and "2508.15884" in remarks["source"]
