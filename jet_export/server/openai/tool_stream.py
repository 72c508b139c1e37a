"""Finds function calls in an answer as its text arrives, in the format that Qwen's chat templates teach:

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

A call is begun by its name, and followed by its arguments in pieces, as the model spells them. What is no call of a
known function stays text: other names, and what is not JSON. In a stream, arguments that have begun cannot be taken
back: if they break off or are not JSON, the pieces end there and the parser is `broken`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

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
    """Of one answer. `names`: the functions that may be called. `several`: keep more than the first call. `whole`:
    the text comes in one piece, and calls whose arguments are no JSON object stay text too."""

    def __init__(self, names: Collection[str], several: bool = True, whole: bool = False) -> None:
        self.names, self.several, self.whole = names, several, whole
        self.calls = 0
        self.broken = False  # the arguments of a call are not what they should be
        self._held = ""  # not decided yet
        self._space = ""  # in front of it; it belongs to the text unless a call follows
        self._state: Callable[[], Iterator[Piece]] = self._in_text
        self._json, self._spelled = _Json(), ""  # the arguments, so far

    def push(self, text: str) -> list[Piece]:
        """What is final with this text."""
        self._held += text
        return list(self._advance())

    def flush(self) -> list[Piece]:
        """What is left at the end of the answer."""
        self.broken |= self._state == self._in_arguments
        rest = "" if self._state == self._behind else self._space + self._held
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
        text, found, rest = self._held.partition(END)
        if not found:
            return
        self._held, self._state = rest, self._in_text
        if call := _parsed(text):
            name, arguments = call
            if name in self.names:
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
            known = json.loads(header[1]) in self.names
        except ValueError:
            return False
        rest = self._held[header.end() :]
        return known and (not self.whole or _is_object(rest[: max(_Json().end(rest), 0)]))

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
