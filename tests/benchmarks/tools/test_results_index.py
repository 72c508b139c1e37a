"""A quoted figure stands in the results file that its section names, as it is quoted, or the index is not complete."""

import json

import pytest
from helpers.scripts import load_script

index = load_script("tools/results_index.py")


def test_every_figure_of_the_documents_has_a_row() -> None:
    rows, missing = index.rows_and_missing()
    assert index.complaints(rows, missing) == []
    told = "INDEX.md is out of date: python benchmarks/tools/results_index.py"
    assert index.INDEX.read_text(encoding="utf-8") == index.rendered(rows), told


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It serves 11,105 tokens/s and 3.4, 7.6 ms later", ["11,105 tokens/s", "3.4 ms", "7.6 ms"]),
        ("an idle connection stays open for 75 s; 1.22 s to start", ["1.22 s"]),
        ("at B1 1.6 us a chunk, 50 % of 3.0 TB/s", ["1.6 µs", "3.0 TB/s"]),
        ("| at | a step |\n|---|---|\n| 1K | 1.69 ms |", ["1.69 ms"]),
        ("| batch | decode, tokens/s |\n|---|---|\n| 64 | B418: 13,235 (90 %) |", ["13,235 tokens/s"]),
        ("In milliseconds:\n\n| at | FLA | ours |\n|---|---|---|\n| 2K | 1.79 | 0.79 (2.3x) |", ["1.79 ms", "0.79 ms"]),
        ("| a | b |\n|---|---|\n| 64 | 13,235 |", []),
        ("```\n$ jet-export bench\n591 tokens/s\n```\n", []),
    ],
)  # fmt: skip
def test_what_is_a_figure(text: str, found: list[str]) -> None:
    quoted = [str(figure) for part in index.parts(text) for figure in index.figures("x", part)]
    assert quoted == found


@pytest.mark.parametrize(
    ("number", "unit", "values", "stands"),
    [
        ("1.69", "ms", (1.6949,), True),
        ("1.69", "ms", (0.0016949,), True),  # of a file in seconds
        ("1.70", "ms", (1.6949,), False),
        ("11,105", "tokens/s", (11104.6,), True),
        ("11,105", "tokens/s", (11.1046,), False),
    ],
)
def test_a_figure_stands_there_to_its_last_digit(number, unit, values, stands) -> None:
    assert index.Figure("x", "y", number, unit).stands_in(values) is stands


def test_only_the_files_that_are_named_count(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(index, "RESULTS", tmp_path)
    for name, commit in (("a", "1111111"), ("b", "")):
        (tmp_path / "gpu" / name).mkdir(parents=True)
        result = {"environment": {"commit": commit}, "rows": [{"ms": 2.5 if name == "a" else 3.5}]}
        (tmp_path / "gpu" / name / "r.json").write_text(json.dumps(result))
    text = "# Title\n<!-- results: gpu/a -->\n2.5 ms\n\n## Other\n<!-- results: gpu/b/r.json -->\n3.5 ms, 4.5 ms\n"
    document = tmp_path / "README.md"
    document.write_text(text)
    monkeypatch.setattr(index, "ROOT", tmp_path)
    monkeypatch.setattr(index, "documents", lambda: [document])
    index.source.cache_clear()
    rows, missing = index.rows_and_missing()
    index.source.cache_clear()
    assert [(str(row.figure), row.source.name) for row in rows] == [
        ("2.5 ms", "gpu/a/r.json"),
        ("3.5 ms", "gpu/b/r.json"),
    ]
    assert [str(figure) for figure in missing] == ["4.5 ms"]
    told = index.complaints(rows, missing)
    assert "README.md, Other: 4.5 ms stands in no results file" in told[0]
    assert told[1].startswith("gpu/a/r.json") and told[2].startswith("gpu/b/r.json")  # no command, no commit
