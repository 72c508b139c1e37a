"""Files of values (JSON, TOML) against a schema: dataclasses and TypedDicts whose types say what a value may be.

Pydantic checks; a mistake becomes one JetExportError: where, which key, what it holds, what it takes.

    recipe.toml: stage.lr is 'fast'.
    It takes a number above 0.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails
from typing_extensions import is_typeddict

from jet_export.utils.errors import JetExportError, shown

T = TypeVar("T")
MOST = 10**18  # of counts: what an int64, and a float, still hold nearly exactly


Count = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(ge=1, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def one_or_many(value: Any) -> Any:
    """Validator of a tuple that may be written as one of its items."""
    return tuple(value) if isinstance(value, list) else (value,)


OneOrMany = BeforeValidator(one_or_many)


@dataclasses.dataclass(frozen=True)
class CheckedAs:
    """Annotation of a wider type, for those who read the value: `Annotated[str, CheckedAs(Literal["a", "b"])]`."""

    type: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(self.type)


@dataclasses.dataclass(frozen=True)
class Called:
    """Annotation: what messages call a value of this type, where its words would not do: "a token id"."""

    words: str


def one_of(*words: str) -> CheckedAs:
    """Annotation of a str."""
    return CheckedAs(Literal[words])


def read_toml(path: Path, where: str, see: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises JetExportError where it cannot be read. `see`: what the reader should do."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JetExportError(f"{where}: no such file.", see) from None
    except (ValueError, OSError) as e:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise JetExportError(f"{where}: not valid TOML: {e}.", see) from None
    except RecursionError:
        raise JetExportError(f"{where}: not valid TOML: nested too deeply.", see) from None


def read_json(path: Path, see: str = "") -> Any:
    """The value in a JSON file. Raises JetExportError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JetExportError(f"{path}: no such file.", see) from None
    except OSError as e:
        raise JetExportError(f"{path}: cannot be read ({e.strerror}).", see) from None
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise JetExportError(f"{path}: not valid JSON: {e}.", see) from None
    except RecursionError:
        raise JetExportError(f"{path}: not valid JSON: nested too deeply.", see) from None


def read_json_object(path: Path, see: str = "") -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file. Raises JetExportError for anything else."""
    values = read_json(path, see) if path.is_file() else {}
    if not isinstance(values, dict):
        raise JetExportError(f"{path}: not a JSON object.", see)
    return values


def parse(cls: type[T], values: Any, where: str, see: str = "", *, table: str = "table", closed: bool = True) -> T:
    """`cls` of these values, as a JSON or TOML reader gives them.

    `closed`: refuse keys that are not known, everywhere; else where `cls` says so. `table`: what the format calls an
    object. Raises JetExportError naming the first key that is wrong.
    """
    try:
        text = json.dumps(values, default=_refuse)
        known: Any = cls  # mypy: type[T] is Hashable, too
        checked: T = adapter(known).validate_json(text, strict=True, extra="forbid" if closed else None)
        return checked
    except TypeError as e:
        raise JetExportError(f"{where}: {e}.", see) from None
    except RecursionError:
        raise JetExportError(f"{where}: nested too deeply.", see) from None
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False)[0]
    if error["type"] == "json_invalid":
        raise JetExportError(f"{where}: not valid: {error['ctx']['error']}.", see)
    raise _message(_place(cls, values, error["loc"]), error, where, see, table)


@functools.cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _refuse(value: Any) -> None:
    """Of what JSON has no type for: TOML's dates."""
    raise TypeError(f"{value} is a {type(value).__name__}, which no key takes")


class _Place(NamedTuple):
    """Where a mistake is."""

    key: str
    value: Any
    expected: Any  # its type
    parent: Any  # the type that has it


def _place(cls: Any, values: Any, location: Sequence[str | int]) -> _Place:
    """`location`: the keys and indices that lead to it; "[key]" after a key of a dict that is itself wrong."""
    types_, value, item = [cls], values, ""
    wrong_key = len(location) > 1 and location[-1] == "[key]"
    for step in location[:-2] if wrong_key else location:
        types_.append(_member(types_[-1], step))
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None  # None: missing
        elif isinstance(value, list):  # else a single item in place of a list
            item = f"[{step}]" if len(value) > 1 and step is location[-1] else ""
            value = value[step] if step < len(value) else None
    if wrong_key:
        value = location[-2]
        types_.append(typing.get_args(_bare(types_[-1])[0])[0])
    names = [step[:80] for step in (location[:-2] if wrong_key else location) if isinstance(step, str)]
    return _Place(".".join(names) + item, value, types_[-1], types_[-2] if len(types_) > 1 else cls)


def _message(place: _Place, error: ErrorDetails, where: str, see: str, table: str) -> JetExportError:
    """One of pydantic's errors in our words."""
    key, value, expected, parent = place
    kind, what = error["type"], f"{where}: {key or 'it'} is {shown(value)}"
    if kind == "too_short":
        return JetExportError(f"{where}: {key} is empty.", see)
    if kind == "missing":
        last = error["loc"][-1]
        if isinstance(last, int):  # an item of a list of so many
            return JetExportError(f"{where}: {key.removesuffix(f'[{last}]')} is too short.", see)
        return JetExportError(f"{where}: {key} is missing.", see)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return JetExportError(f"{where}: {key} is not known.", f"Known: {', '.join(_members(parent))}.")
    if kind == "value_error":  # of a validator of ours, whose words end the sentence
        return JetExportError(f"{what}, {error['ctx']['error']}.", see)
    if _members(expected):
        return JetExportError(f"{what}, not {_article(table)}.", see)
    if _holds_tables(expected) and table == "table":
        return JetExportError(f"{what}, not a list of tables.", f"Write [[{key}]].")
    takes = f"It takes {describe(expected, table, kind == 'less_than_equal')}."
    if kind == "finite_number":
        takes = takes.replace("a number.", "a finite number.")
    return JetExportError(f"{what}.", f"{takes} {see}".rstrip())


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _bare(kind: Any) -> tuple[Any, list[Any]]:
    """A type without Annotated, Required and the like, and what they said."""
    said: list[Any] = []
    while True:
        origin = typing.get_origin(kind)
        if origin is Annotated:
            kind, *more = typing.get_args(kind)
            said += more
            kind = next((m.type for m in more if isinstance(m, CheckedAs)), kind)
        elif origin in (typing.Required, typing.NotRequired):
            (kind,) = typing.get_args(kind)
        elif origin in (Union, types.UnionType) and type(None) in typing.get_args(kind):
            kind = Union[tuple(k for k in typing.get_args(kind) if k is not type(None))]  # noqa: UP007  built here
        else:
            return kind, said


def _members(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass or TypedDict, with their types; {} of anything else."""
    bare, _ = _bare(kind)
    if is_typeddict(bare) or (dataclasses.is_dataclass(bare) and isinstance(bare, type)):
        return typing.get_type_hints(bare, include_extras=True)
    return {}


def _member(kind: Any, step: str | int) -> Any:
    """The type of what lies under this key, or at this place of a list."""
    members = _members(kind)
    if members:
        return members.get(str(step), Any)
    arguments = [a for a in typing.get_args(_bare(kind)[0]) if a is not Ellipsis]
    return arguments[min(step, len(arguments) - 1) if isinstance(step, int) else -1] if arguments else Any


def _holds_tables(kind: Any) -> bool:
    bare, _ = _bare(kind)
    return typing.get_origin(bare) in (tuple, list) and bool(_members(_member(bare, 0)))


def describe(kind: Any, table: str = "table", most: bool = False) -> str:
    """What a field of this type takes, in words. `most`: name the bound that all numbers have, too."""
    bare, said = _bare(kind)
    origin = typing.get_origin(bare)
    if called := next((s.words for s in said if isinstance(s, Called)), None):
        return called
    if origin is Literal:
        return ", ".join(map(str, typing.get_args(bare)))
    if origin in (tuple, list):
        return f"a list, each of it {describe(_member(bare, 0), table)}"
    if origin is dict or bare is dict:
        return _article(table)
    if bare is bool:
        return "true or false"
    if bare is str:
        return "a string"
    if bare not in (int, float):
        return "something else"
    bounds = {type(m).__name__: m for s in said if isinstance(s, FieldInfo) for m in s.metadata}
    number = "a whole number" if bare is int else "a number"
    above = bounds.get("Gt")
    low, high = bounds.get("Ge"), bounds.get("Le")
    number += f" above {above.gt:g}" if above else f" of at least {low.ge:g}" if low else ""
    return number + (f", at most {high.le:g}" if high and (most or high.le != MOST) else "")
