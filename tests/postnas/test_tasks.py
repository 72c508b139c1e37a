"""Tasks from files: what is scored, what is cut, and what is refused."""

import json
from pathlib import Path

import pytest

from jet_export.postnas.recipe import TaskRecipe
from jet_export.postnas.tasks import Item, Task, load_task
from jet_export.training.data.rows import IGNORED
from jet_export.utils.errors import JetExportError

END = 0


def encode(text: str) -> list[int]:
    return [*map(ord, text), END]


def load(path: Path, kind: str, length: int = 100, **more) -> Task:
    return load_task(TaskRecipe(name="t", kind=kind, path=str(path), **more), encode, True, length)


def text_of(item: Item, span: tuple[int, int]) -> str:
    return "".join(map(chr, item.tokens[slice(*span)]))


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_text_is_cut_into_items_that_are_scored_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abcdefghij\nklm\n")
    task = load(file, "loss", length=6)
    assert [text_of(i, (0, 9)) for i in task.items] == ["abcdef", "ghij\nk", "lm\n"]
    assert [i.spans for i in task.items] == [[(1, 6)], [(1, 6)], [(1, 3)]]
    assert not task.counts_answers and len(load(file, "loss", length=6, items=2).items) == 2


def test_recall_scores_values_that_were_defined_before(tmp_path: Path) -> None:
    text = "x\nA01=1234\nB02?9999\nA01?1234\nB02=5678\nB02?5678\n"
    task = load(jsonl(tmp_path / "r.jsonl", {"text": text}), "recall")
    (item,) = task.items
    assert text_of(item, (0, 99)) == text
    assert [text_of(item, s) for s in item.spans] == ["1234", "5678"]
    cut = load(tmp_path / "r.jsonl", "recall", length=34)
    assert len(cut.items[0].tokens) == 34 and [text_of(cut.items[0], s) for s in cut.items[0].spans] == ["1234"]


def test_completions_score_the_answer_after_the_end_of_the_prompt(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "c.jsonl", {"q": "0123456789", "a": "xy"}, {"q": "", "a": "no prompt"})
    task = load(file, "completion", length=6, prompt_field="q", answer_field="a")
    (item,) = task.items
    assert text_of(item, (0, 9)) == "6789xy" and [text_of(item, s) for s in item.spans] == ["xy"]
    row = item.row(8)
    assert row.lengths == [6, 2] and row.labels == [*[IGNORED] * 3, ord("x"), ord("y"), *[IGNORED] * 3]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JetExportError, match=r"task t: .*no.jsonl cannot be read"):
        load(tmp_path / "no.jsonl", "recall")
    with pytest.raises(JetExportError, match=r"has no string under 'prompt'; it has: text"):
        load(jsonl(tmp_path / "f.jsonl", {"text": "a"}), "completion", answer_field="text")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(JetExportError, match=r"bad.jsonl, line 2: not a JSON object"):
        load(tmp_path / "bad.jsonl", "recall")
    with pytest.raises(JetExportError, match=r"gives no item of up to 5 tokens"):
        load(jsonl(tmp_path / "n.jsonl", {"text": "A01=1234\nA01?1234"}), "recall", length=5)
