"""evaluation/tasks: what the local tasks' documents are made of."""

import json
import re

import pytest

pytest.importorskip("datasets")

from jet_export.evaluation.tasks import needle, recall, text
from jet_export.evaluation.tasks.settings import HELD_OUT, TaskSettings
from jet_export.model.hub import JET_TINY_DIR
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.utils.errors import JetExportError

TOKENIZER = load_tokenizer(JET_TINY_DIR)
METADATA = TaskSettings(bundle=str(JET_TINY_DIR), max_length=1023).metadata()
KINDS = ["single", "multikey", "multivalue", "multiquery", "variables"]


def size(string: str) -> int:
    return len(TOKENIZER.encode(string, special_tokens=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_needle_document_has_its_length_and_its_answers(kind, monkeypatch) -> None:
    monkeypatch.setattr(needle, "COUNT", 3)
    rows = list(getattr(needle, kind)(**{**METADATA, "lengths": [512, 1000], "version": 1})["test"])
    assert [r["length"] for r in rows] == [512, 1000] * 3  # in turns: a limit keeps every length
    for row in rows:
        room = row["length"] - needle.NEW_TOKENS
        assert 0.9 * room < size(row["input"]) <= room
        haystack = row["input"].rsplit("\n\n", 1)[0]
        assert all(answer in haystack for answer in row["answers"])
        assert len(row["answers"]) == {"single": 1, "multikey": 1, "variables": 5}.get(kind, 4)
        hidden = re.findall(r"One of the magic numbers[^.]*\.|VAR \w+ = [^.]*\.", haystack)
        assert len(hidden) == {"single": 1, "variables": 5}.get(kind, 4)


def test_variables_are_a_chain_in_order(monkeypatch) -> None:
    monkeypatch.setattr(needle, "COUNT", 2)
    for row in needle.variables(**METADATA)["test"]:
        assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", row["input"])
        assert [a for a, _ in assigned] == row["answers"]
        assert [b for _, b in assigned[1:]] == row["answers"][:-1] and assigned[0][1] in row["input"].split("value ")[1]


def test_the_score_is_the_share_of_the_answers_in_the_text() -> None:
    document = {"answers": ["12", "ab"], "length": 512}
    assert needle.score(document, ["it is 12 and AB"]) == {"score": 1.0, "score_512": 1.0}
    assert needle.score(document, ["12"]) == {"score": 0.5, "score_512": 0.5}


def test_recall_is_asked_at_its_distance(monkeypatch) -> None:
    monkeypatch.setattr(recall, "COUNT", 10)
    rows = list(recall.by_distance(**METADATA)["test"])
    assert [r["length"] for r in rows[:4]] == [64, 128, 256, 512]
    for row in rows:
        key = row["context"].rsplit("\n", 1)[1].removesuffix("?")
        (definition,) = re.findall(rf"^{key}=(\d{{4}})$", row["context"], re.M)
        assert definition == row["answer"]
        distance = size(row["context"][row["context"].index(f"{key}=") + 3 :])
        assert 0.4 * row["length"] < distance <= 1.05 * row["length"]


def test_bits_per_byte_has_the_whole_text_in_pieces() -> None:
    pieces = [r["text"] for r in text.pieces(**METADATA)["test"]]
    assert "".join(pieces) == HELD_OUT.read_text(encoding="utf-8")
    assert all(text.PIECE_BYTES <= len(p.encode()) < text.PIECE_BYTES + 200 for p in pieces[:-1])


def test_a_completion_continues_a_line_of_the_text() -> None:
    source = HELD_OUT.read_text(encoding="utf-8")
    rows = list(text.lines(**METADATA)["test"])
    assert len(rows) == text.LINES
    for row in rows:
        assert f"{row['context']}{row['rest']}\n" in source
        assert row["rest"].strip() and size(row["context"]) < text.CONTEXT_TOKENS + 40
    scored = text.score_line(rows[0], [f" {rows[0]['rest']} "])
    assert scored == {"exact_match": 1.0, "edit_similarity": 1.0}
    assert text.score_line(rows[0], [""]) == {"exact_match": 0.0, "edit_similarity": 0.0}


def test_documents_come_out_the_same_each_time(monkeypatch) -> None:
    monkeypatch.setattr(needle, "COUNT", 2)
    monkeypatch.setattr(recall, "COUNT", 2)
    for make in (needle.single, needle.multiquery, recall.by_distance, text.lines):
        once, again = (json.dumps(list(make(**METADATA)["test"])) for _ in range(2))
        assert once == again


def test_bad_settings(tmp_path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for changes, message in [
        ({"text": str(binary)}, "not UTF-8"),
        ({"text": str(tmp_path / "none")}, "No such file"),
    ]:
        with pytest.raises(JetExportError, match=message):
            text.pieces(**{**METADATA, **changes})
    with pytest.raises(JetExportError, match="--lengths 4096: not between 64 and 1023"):
        needle.single(**{**METADATA, "lengths": [4096]})
    with pytest.raises(JetExportError, match="documents of 512 tokens or more"):
        needle.single(**{**METADATA, "max_length": 255})
