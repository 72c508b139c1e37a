"""Structured output: what a request's answer must match, as JSON, a regular expression or a grammar.

A description only, which travels with Params; grammar_compile.py compiles it and grammar_masks.py applies it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jet_export.utils.errors import JetExportError

Kind = Literal["json_schema", "regex", "lark", "choice", "tagged"]
MAX_BYTES = 1 << 20  # of a grammar's text
MAX_LARK_BYTES = 1 << 18  # of those that are compiled by recursion over their rules
MAX_CHOICE_OPTIONS = 4096


@dataclass(frozen=True)
class Grammar:
    """`kind` says what `text` is; use the constructors below. Whether it compiles is found when it is submitted.

    Raises JetExportError for an unknown kind, and for a text that is too long or no JSON where it must be."""

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise JetExportError(f"{self.kind!r} is no kind of grammar.", f"Use one of {', '.join(get_args(Kind))}.")
        limit = MAX_LARK_BYTES if self.kind == "lark" else MAX_BYTES
        if len(self.text) > limit or len(self.text.encode("utf-8", "surrogatepass")) > limit:
            raise JetExportError(f"The {self.name} is longer than {limit} bytes.", "Give a smaller one.")

    @property
    def name(self) -> str:
        """For messages."""
        names = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "list of choices"}
        return names.get(self.kind, "grammar")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON text that a JSON schema accepts: a schema, or one as JSON."""
        if isinstance(schema, str):
            if len(schema) > MAX_BYTES:
                return cls("json_schema", schema)  # refused
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as e:
                raise JetExportError(f"The JSON schema is no JSON ({str(e)[:200]}).") from None
        if not isinstance(schema, Mapping | bool):
            raise JetExportError("A JSON schema is an object, true or false.")
        return cls("json_schema", _json(schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole (syntax of Rust's regex, without look-around)."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text that a context-free grammar derives from `start`: in llguidance's Lark, or in llama.cpp's GBNF, whose
        `root ::=` tells it apart."""
        return cls("lark", text)

    @classmethod
    def choice(cls, options: Iterable[str]) -> Grammar:
        """One of some texts."""
        listed = list(options)
        if not 1 <= len(listed) <= MAX_CHOICE_OPTIONS:
            raise JetExportError(f"choice: {len(listed)} texts; between 1 and {MAX_CHOICE_OPTIONS} are accepted.")
        return cls("choice", _json(listed))

    @classmethod
    def tagged(
        cls, items: Iterable[tuple[str, Mapping[str, Any] | bool, str]], *, several: bool = False, free: bool = False
    ) -> Grammar:
        """One of these, or `several` with a newline between two: a text, JSON that a schema accepts, another text.
        Added tokens of the tokenizer that stand in the texts, such as <tool_call>, are made as such, and spelled where
        it has none of that name. `free`: other text, in which none of those tokens stands, may come before, between
        and after them, or alone; each must begin with such a token then."""
        listed = [{"begin": begin, "schema": schema, "end": end} for begin, schema, end in items]
        if not listed:
            raise JetExportError("tagged: no items.")
        return cls("tagged", _json({"items": listed, "several": several, "free": free}))


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as e:
        raise JetExportError(f"The grammar is no JSON ({str(e)[:200]}).") from None
