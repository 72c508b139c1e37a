"""Training data: packing, formats, shards, and going on from a state."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jet_export.training.data.rows import IGNORED, Batch, Packer, Row
from jet_export.training.data.shard import Shard
from jet_export.training.data.stream import DataStream, encoder
from jet_export.training.data.tokenizer import Remembering
from jet_export.training.recipe import DataRecipe, SourceRecipe
from jet_export.utils.errors import JetExportError

LENGTH = 16
DOCUMENTS = [f"{i} " + "x" * (i * 7 % 40) for i in range(50)]
FORMATS = ("text", "jsonl", "parquet", "hf")


def encode(text: str) -> list[int]:
    """The bytes of a document, and 0 at its end."""
    return encoder(lambda t: list(t.encode()), 0)(text)


def write(where: Path, kind: str, documents: list[str]) -> SourceRecipe:
    """In two files."""
    half = len(documents) // 2
    for i, part in enumerate((documents[:half], documents[half:])):
        if kind == "text":
            (where / f"{i}.txt").write_text("<|endoftext|>\n".join(f"{d}\n" for d in part))
        elif kind == "parquet":
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            pq.write_table(pa.table({"text": part, "n": list(range(len(part)))}), where / f"{i}.parquet", 7)
        else:
            (where / f"{i}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in part))
    if kind != "hf":
        return SourceRecipe(name="s", path=str(where))
    pytest.importorskip("datasets")
    (where / "README.md").write_text("")
    return SourceRecipe(name="s", hf=str(where))


def data_of(*sources: SourceRecipe, shards: int = 2, batch: int = 4) -> DataRecipe:
    return DataRecipe(sequence_length=LENGTH, batch=batch, shards=shards, source=sources)


def shard_of(source: SourceRecipe, shard: int = 0, state=None, shards: int = 2) -> Shard:
    return Shard(data_of(source, shards=shards), shard, encode, 0, {source.name: 1.0}, state)


def words(rows: list[Row]) -> list[str]:
    """The documents of the rows, whole again, and what is left of the last."""
    return bytes(t for row in rows for t in row.tokens).decode().split("\0")


def test_a_row_holds_the_documents_one_after_the_other() -> None:
    packer = Packer(LENGTH)
    rng = random.Random(0)
    documents = [[rng.randrange(1, 99) for _ in range(n)] for n in (5, 1, 9, 40, 2, 7, 20)]
    rows = []
    for document in documents:
        packer.add(document)
        while packer.full:
            rows.append(packer.take())
    kept = [d for d in documents if len(d) > 1]  # one token has nothing to predict
    assert [t for row in rows for t in row.tokens] == [t for d in kept for t in d][: LENGTH * len(rows)]
    assert [t for row in rows for t in row.labels] == [t for d in kept for t in (*d[1:], IGNORED)][: LENGTH * len(rows)]
    assert all(sum(row.lengths) == len(row.tokens) == LENGTH for row in rows)
    assert [n for row in rows for n in row.lengths][:5] == [5, 9, 2, 16, 16]  # cut at the rows' ends only


def test_a_batch_knows_each_tokens_sequence_and_place() -> None:
    batch = Batch.of([Row(list(range(5)), [1, IGNORED, 3, 4, IGNORED], [2, 3]), Row([7] * 5, [7] * 5, [5])])
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 10] and batch.cu_seqlens.dtype == torch.int32
    assert batch.segments.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.targets == 8 and batch.length == 5


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_share_the_documents_of_every_format(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path, kind, DOCUMENTS)
    seen: set[str] = set()
    for v in range(2):
        shard = shard_of(source, v)
        rows = [shard.row() for _ in range(60)]
        own = [w.strip() for w in words(rows)[:-1]]
        once = own[: len(own) - own[1:].index(own[0])] if own[0] in own[1:] else own
        assert not seen & set(once)
        assert own[25] == own[0]  # the next epoch
        seen |= set(own)
    assert seen == {d.strip() for d in DOCUMENTS}


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_go_on_from_any_state(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path, kind, DOCUMENTS)
    shard = shard_of(source, 1)
    rows, states = [], []
    for _ in range(70):  # more than an epoch
        rows.append(shard.row())
        states.append(json.dumps(shard.state()))
    for n in (0, 3, 29, 30, 31, 50):
        later = shard_of(source, 1, json.loads(states[n]))
        assert [later.row() for _ in range(10)] == rows[n + 1 : n + 11], n


def test_two_processes_have_the_rows_of_one(tmp_path: Path) -> None:
    data = data_of(write(tmp_path, "jsonl", DOCUMENTS), shards=4, batch=8)
    weights = {"s": 1.0}
    alone = DataStream(data, encode, 0, weights)
    pair = [DataStream(data, encode, 0, weights, rank, 2) for rank in range(2)]
    for _ in range(3):
        whole = alone.next()
        parts = [p.next() for p in pair]
        key = lambda row: (row.tokens, row.lengths)  # noqa: E731
        assert sorted((r for p in parts for r in p.rows), key=key) == sorted(whole.rows, key=key)
        assert {k: v for p in parts for k, v in p.states.items()} == whole.states
    for stream in (alone, *pair):
        stream.close()
    with pytest.raises(JetExportError, match=r"data.shards 4 is not a multiple of the 3 processes"):
        DataStream(data, encode, 0, weights, 0, 3)


def test_a_mixture_has_its_shares(tmp_path: Path) -> None:
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": letter * 7}) + "\n") * 20)
    sources = [SourceRecipe(name=n, path=str(tmp_path / f"{n}.jsonl")) for n in "ab"]
    shard = Shard(data_of(*sources), 0, encode, 0, {"a": 3.0, "b": 1.0})
    found = "".join(words([shard.row() for _ in range(400)]))
    assert 0.70 < found.count("a") / len(found) < 0.80
    only = Shard(data_of(*sources), 0, encode, 0, {"a": 0.0, "b": 1.0})
    assert "a" not in "".join(words([only.row() for _ in range(20)]))


def test_long_texts_are_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(200)]
    (tmp_path / "long.txt").write_text("".join(lines))
    shards = [shard_of(SourceRecipe(name="s", path=str(tmp_path / "long.txt")), v) for v in range(2)]
    own = [words([s.row() for _ in range(45)])[:-1] for s in shards]
    joined = "".join(piece for pair in zip(*own, strict=False) for piece in pair)
    assert joined == "".join(lines)[: len(joined)] and len(joined) > 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\nnot json\n', r"0.jsonl, byte 17: a line that is not JSON"),
        ('{"body": "x"}\n', r"0.jsonl, byte 0: no string under 'text'; the line has: body"),
        ("", r"data source s: 0 documents; data.shards is 2"),
        ('{"text": "one"}\n', r"data source s: 1 documents; data.shards is 2"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "0.jsonl").write_text(content)
    source = SourceRecipe(name="s", path=str(tmp_path / "*.jsonl"))
    with pytest.raises(JetExportError, match=message):
        for v in range(2):
            shard_of(source, v).row()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.txt", b"good\ncaf\xe9 au lait, and more of it until the piece ends here\n", r"0.txt, byte 8: not UTF-8"),
        ("0.parquet", b"PAR1 but not really", r"0.parquet: damaged or not parquet"),
        ("0.bin", b"x", r"names no file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JetExportError, match=message):
        shard_of(SourceRecipe(name="s", path=str(tmp_path)), shards=1).row()


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = replace(write(tmp_path, "parquet", DOCUMENTS), field="body")
    with pytest.raises(JetExportError, match=r"0.parquet has no column 'body'.\nIts columns: text, n"):
        shard_of(source).row()


def test_an_error_reaches_the_step_whose_rows_it_stops(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * 15}) + "\n" for _ in range(8)]
    (tmp_path / "0.jsonl").write_text("".join([*lines, "broken\n", "broken\n"]))
    stream = DataStream(data_of(SourceRecipe(name="s", path=str(tmp_path))), encode, 0, {"s": 1.0})
    assert [len(stream.next().rows) for _ in range(2)] == [4, 4]
    with pytest.raises(JetExportError, match=r"byte 224: a line that is not JSON"):
        stream.next()
    stream.close()


def test_a_text_is_tokenised_once_while_there_is_room() -> None:
    asked: list[str] = []

    def tokenise(text: str) -> list[int]:
        asked.append(text)
        return encode(text)

    remembering = Remembering(tokenise, limit=10)
    for text in ("abcd", "abcd", "efghijk", "efghijk", "lmno", "lmno", "abcd"):
        found = remembering(text)
        assert found == encode(text)
        found.append(0)  # what is kept is not the caller's
    assert asked == ["abcd", "efghijk", "efghijk", "lmno"]
