"""Values against a schema: what fits becomes the dataclass; what does not is one message that says what it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from typing_extensions import TypedDict

from jet_export.utils.errors import JetExportError
from jet_export.utils.schema import (
    Called,
    CheckedAs,
    Count,
    OneOrMany,
    Positive,
    Share,
    Size,
    parse,
    read_json,
    read_toml,
)


class Author(TypedDict, total=False):
    name: str
    age: Count


@dataclass(frozen=True, kw_only=True)
class Item:
    size: Size = 1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Box:
    item: Item = Item()
    items: tuple[Item, ...] = ()
    scale: Positive = 1.0
    share: Share = 0.5
    flag: bool = False
    names: Annotated[tuple[str, ...], OneOrMany] = ()
    numbers: tuple[Count, ...] = ()
    by_kind: dict[Literal["a", "b"], Positive] = field(default_factory=dict)
    author: Annotated[dict[str, Any], CheckedAs(Author)] = field(default_factory=dict)
    note: str | None = None
    token: Annotated[int, Called("a token id")] = 0
    any: Annotated[float, Field(allow_inf_nan=False)] = 0.0


def test_what_fits_becomes_the_dataclass() -> None:
    values = {"item": {"size": 3}, "items": [{"kind": "b"}], "scale": 2, "names": "x", "author": {"name": "n"}}
    box = parse(Box, values, "f")
    assert box == Box(item=Item(size=3), items=(Item(kind="b"),), scale=2.0, names=("x",), author={"name": "n"})
    assert isinstance(box.scale, float) and type(box.author) is dict
    assert parse(Box, {}, "f") == Box()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"item": {"size": 0}}, "f: item.size is 0.\nIt takes a whole number of at least 1."),
        ({"item": {"size": 2**70}}, f"f: item.size is {2**70}.\nIt takes a whole number of at least 1, at most 1e+18."),
        ({"item": {"size": 1.0}}, "f: item.size is 1.0.\nIt takes a whole number of at least 1."),
        ({"item": {"size": True}}, "f: item.size is True.\nIt takes a whole number of at least 1."),
        ({"item": {"size": "1"}}, "f: item.size is '1'.\nIt takes a whole number of at least 1."),
        ({"item": {"size": None}}, "f: item.size is None.\nIt takes a whole number of at least 1."),
        ({"item": 3}, "f: item is 3, not a table.\nsee"),
        ({"numbers": [1, 2, -1]}, "f: numbers[2] is -1.\nIt takes a whole number of at least 0."),
        ({"token": "x"}, "f: token is 'x'.\nIt takes a token id."),
        ({"any": float("nan")}, "f: any is nan.\nIt takes a finite number."),
        ({"items": {}}, "f: items is {}, not a list of tables.\nWrite [[items]]."),
        ({"items": [3]}, "f: items is 3, not a table.\nsee"),
        ({"items": [{}, {"kind": "c"}]}, "f: items.kind is 'c'.\nIt takes a, b."),
        ({"scale": 0}, "f: scale is 0.\nIt takes a number above 0."),
        ({"scale": float("nan")}, "f: scale is nan.\nIt takes a number above 0."),
        ({"scale": float("inf")}, "f: scale is inf.\nIt takes a number above 0."),
        ({"share": 1.5}, "f: share is 1.5.\nIt takes a number of at least 0, at most 1."),
        ({"flag": 1}, "f: flag is 1.\nIt takes true or false."),
        ({"names": [1]}, "f: names is 1.\nIt takes a string."),
        ({"numbers": 1}, "f: numbers is 1.\nIt takes a list, each of it a whole number of at least 0."),
        ({"by_kind": {"c": 1}}, "f: by_kind is 'c'.\nIt takes a, b."),
        ({"by_kind": {"a": -1}}, "f: by_kind.a is -1.\nIt takes a number above 0."),
        ({"author": {"age": "1"}}, "f: author.age is '1'.\nIt takes a whole number of at least 0."),
        ({"author": {"born": 1}}, "f: author.born is not known.\nKnown: name, age."),
        ({"author": []}, "f: author is [], not a table.\nsee"),
        ({"colour": 1}, "f: colour is not known.\nKnown: item, items,"),
        ({"note": 3}, "f: note is 3.\nIt takes a string."),
        ({"note": date(2026, 1, 2)}, "f: 2026-01-02 is a date, which no key takes.\nsee"),
        ([], "f: it is [], not a table.\nsee"),
        ({"note": "\ud800"}, "f: not valid"),
        ({"note": ["x" * 99]}, f"f: note is ['{'x' * 78}....\nIt takes a string."),
    ],
)
def test_what_does_not_is_one_message(values: Any, message: str) -> None:
    with pytest.raises(JetExportError) as e:
        parse(Box, values, "f", "see")
    assert str(e.value).startswith(message)


def test_a_field_that_is_missing_is_named() -> None:
    @dataclass
    class Needs:
        name: str

    with pytest.raises(JetExportError, match=r"^f: name is missing.\nsee$"):
        parse(Needs, {}, "f", "see", table="object")


@pytest.mark.parametrize(("read", "end"), [(read_json, ""), (lambda path: read_toml(path, str(path), "see"), "\nsee")])
@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "no such file."), (b"\xff", "not valid"), (b"{", "not valid"), (b"a = " + b"[" * 100_000, "not valid")],
)
def test_a_file_that_cannot_be_read_is_one_message(
    tmp_path: Path, read: Any, end: str, data: Any, message: str
) -> None:
    path = tmp_path / "f"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(JetExportError) as e:
        read(path)
    assert str(e.value).startswith(f"{path}: {message}") and str(e.value).endswith(end)
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(JetExportError, match="not valid"):
        read(path)
