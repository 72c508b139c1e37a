"""Finds function calls in an answer as its text arrives, in the formats that Qwen's chat templates teach:

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

or, from Qwen3-Coder on, with a function's parameters in tags (xml_calls.py). A call is begun by its name, and followed
by its arguments in pieces, as the model spells them. What is no call of a known function stays text: other names, and
what is not JSON. In a stream, arguments that have begun cannot be taken back: if they break off or are not JSON, the
pieces end there and the parser is `broken`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jet_export.server.openai.xml_calls import HEADER, Status, XmlArguments

BEGIN, END = "<tool_call>", "</tool_call>"
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_CLOSING = re.compile(r"[\s}]*")


@dataclass(frozen=True)
class TextPiece:
    text: str


@dataclass(frozen=True)
class CallBegins:
    """The answer's call number `index`."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    index: int
    text: str


Piece = TextPiece | CallBegins | ArgumentsPiece


class _Json:
    """Where a JSON object that arrives in pieces ends; brackets and strings only."""

    def __init__(self) -> None:
        self.depth, self.in_string, self.escaped = 0, False, False

    def end(self, text: str) -> int:
        """Characters of `text` up to the end of the object; -1: it goes on."""
        for i, c in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped, self.in_string = c == "\\", c != '"'
            elif c == '"':
                self.in_string = True
            elif c in "{[":
                self.depth += 1
            elif c in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return i + 1
        return -1


class ToolParser:
    """Of one answer. `schemas`: of the arguments of the functions that may be called, by name. `several`: keep more
    than the first call. `whole`: the text comes in one piece, and calls whose arguments are no JSON object stay text
    too."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]], several: bool = True, whole: bool = False) -> None:
        self.schemas, self.several, self.whole = schemas, several, whole
        self.calls = 0
        self.broken = False  # the arguments of a call are not what they should be
        self._held = ""  # not decided yet
        self._space = ""  # in front of it; it belongs to the text unless a call follows
        self._state: Callable[[], Iterator[Piece]] = self._in_text
        self._json, self._spelled = _Json(), ""  # the arguments, so far
        self._xml = XmlArguments({})  # or these

    def push(self, text: str) -> list[Piece]:
        """What is final with this text."""
        self._held += text
        return list(self._advance())

    def flush(self) -> list[Piece]:
        """What is left at the end of the answer."""
        self.broken |= self._state in (self._in_arguments, self._in_parameters)
        rest = "" if self._state in (self._behind, self._in_parameters) else self._space + self._held
        if self._state == self._in_call:
            rest = self._space + BEGIN + self._held
        if self.calls and not rest.strip():
            rest = ""
        self._held = self._space = ""
        return [TextPiece(rest)] if rest else []

    def _advance(self) -> Iterator[Piece]:
        while True:
            before = self._state, self._held
            yield from self._state()
            if (self._state, self._held) == before or not self._held:
                return

    def _in_text(self) -> Iterator[Piece]:
        text, found, rest = self._held.partition(BEGIN)
        if found:
            self._held, self._state = rest, self._in_call
        else:
            keep = next((n for n in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:n])), 0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        text = self._space + text
        at = len(text.rstrip())
        self._space = text[at:]
        if text[:at]:
            yield TextPiece(text[:at])

    def _in_call(self) -> Iterator[Piece]:
        """The name and what is around it, up to the arguments."""
        header = _HEADER.match(self._held)
        if header and self._accepts(header):
            self._held = self._held[header.end() :]
            yield from self._begin(json.loads(header[1]))
            self._json, self._spelled, self._state = _Json(), "", self._in_arguments
            return
        function = HEADER.match(self._held)
        if function and self._opens(function):
            self._held = self._held[function.end() :]
            yield from self._begin(function[1])
            self._xml, self._state = XmlArguments(self.schemas[function[1]]), self._in_parameters
            return
        text, found, rest = self._held.partition(END)
        if not found:
            return
        self._held, self._state = rest, self._in_text
        if call := _parsed(text):
            name, arguments = call
            if name in self.schemas:
                yield from self._begin(name)
                yield from self._arguments(arguments)
                return
        yield TextPiece(self._space + BEGIN + text + END)
        self._space = ""

    def _in_arguments(self) -> Iterator[Piece]:
        end = self._json.end(self._held)
        text, self._held = (self._held, "") if end < 0 else (self._held[:end], self._held[end:])
        self._spelled += text
        if end >= 0:
            self.broken |= not _is_object(self._spelled)
            self._state = self._behind
        yield from self._arguments(text)

    def _in_parameters(self) -> Iterator[Piece]:
        text, self._held = self._xml.take(self._held)
        if self._xml.status is not Status.OPEN:
            self.broken |= self._xml.status is Status.BROKEN
            self._state = self._behind if self._xml.status is Status.DONE else self._in_text
        yield from self._arguments(text)

    def _behind(self) -> Iterator[Piece]:
        """The rest of a call; the last brace and the end are not insisted on."""
        closing = _CLOSING.match(self._held)
        self._held = self._held[closing.end() :] if closing else self._held
        if self._held.startswith(END):
            self._held, self._state = self._held[len(END) :], self._in_text
        elif not END.startswith(self._held):
            self._state = self._in_text
        yield from ()

    def _accepts(self, header: re.Match[str]) -> bool:
        try:
            known = json.loads(header[1]) in self.schemas
        except ValueError:
            return False
        rest = self._held[header.end() :]
        return known and (not self.whole or _is_object(rest[: max(_Json().end(rest), 0)]))

    def _opens(self, function: re.Match[str]) -> bool:
        if function[1] not in self.schemas:
            return False
        arguments = XmlArguments({})
        if self.whole:
            arguments.take(self._held[function.end() :])
        return not self.whole or arguments.status is Status.DONE

    def _begin(self, name: str) -> Iterator[Piece]:
        self._space = ""
        if self.several or not self.calls:
            yield CallBegins(self.calls, name)
        self.calls += 1

    def _arguments(self, text: str) -> Iterator[Piece]:
        if text and (self.several or self.calls == 1):
            yield ArgumentsPiece(self.calls - 1, text)


def _is_object(text: str) -> bool:
    """Whether it is JSON, an object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(text: str) -> tuple[str, str] | None:
    """(name, arguments) of a call whose keys come in another order, or whose arguments are JSON in a string."""
    try:
        call = json.loads(text)
        arguments = call.get("arguments") if isinstance(call, dict) else None
        spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = call.get("name") if isinstance(call, dict) else None
    except (ValueError, RecursionError):
        return None
    return (name, spelled) if isinstance(name, str) and _is_object(spelled) else None
