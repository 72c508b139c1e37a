"""Function calls in the text of an answer: the pieces of a stream add up to the whole answer, however it is cut."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jet_export.server.openai.tool_stream import ArgumentsPiece, CallBegins, TextPiece, ToolParser

NAMES: dict[str, dict[str, Any]] = {"weather": {}, "now": {}}  # and the schemas of their arguments


def call(name: str, arguments: str, end: str = "}\n</tool_call>") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}{end}'


def summed(parser: ToolParser, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(text, [(name, arguments)])"""
    text, calls = "", list[tuple[str, str]]()
    for piece in [*(p for part in parts for p in parser.push(part)), *parser.flush()]:
        if isinstance(piece, TextPiece):
            text += piece.text
        elif isinstance(piece, CallBegins):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        else:
            assert isinstance(piece, ArgumentsPiece) and piece.index == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + piece.text
    return text, calls


def cut(text: str, at: list[int]) -> list[str]:
    ends = [0, *sorted(i % (len(text) + 1) for i in at), len(text)]
    return [text[a:b] for a, b in pairwise(ends)]


PARIS = '{"city": "Paris", "days": [1, {"a": "}"}], "quote": "\\"}</tool_call>"}'
WELL_FORMED = [
    ("", "", []),
    ("plain text, with 2 < 3 and <tool", "plain text, with 2 < 3 and <tool", []),
    ("ends in a space \n", "ends in a space \n", []),
    (call("weather", PARIS), "", [("weather", PARIS)]),
    ("Let me see.\n" + call("weather", PARIS), "Let me see.", [("weather", PARIS)]),
    (call("weather", "{}") + "\n" + call("now", '{"a": 1}'), "", [("weather", "{}"), ("now", '{"a": 1}')]),
    (call("now", "{}") + "\nThat was it.", "\nThat was it.", [("now", "{}")]),
    (call("now", "{}", "}"), "", [("now", "{}")]),  # the turn ended before the end of the call
    (call("now", "{}", "</tool_call>") + " ok", " ok", [("now", "{}")]),  # a brace short
    ('<tool_call>{"arguments": {"é": 1}, "name": "now"}</tool_call>', "", [("now", '{"é": 1}')]),
    ('<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
]
NO_CALLS = [
    call("other", "{}"),
    call("now", "5"),
    call("now", "[1]"),
    "<tool_call>\nnow()\n</tool_call>",
    '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
    '<tool_call>\n{"name": "now", "argu',
    " <tool_call>",
    "</tool_call>",
]


@given(st.sampled_from(WELL_FORMED), st.lists(st.integers(0, 200), max_size=12))
def test_a_stream_adds_up_to_the_whole(case, at) -> None:
    text, content, calls = case
    streamed = ToolParser(NAMES)
    assert summed(streamed, cut(text, at)) == (content, calls) and not streamed.broken
    assert summed(ToolParser(NAMES, whole=True), [text]) == (content, calls)


@given(st.sampled_from(NO_CALLS), st.lists(st.integers(0, 100), max_size=12))
def test_what_is_no_call_stays_text(text, at) -> None:
    for behind in ("", " and more"):
        assert summed(ToolParser(NAMES), cut(text + behind, at)) == (text + behind, [])
        assert summed(ToolParser(NAMES, whole=True), [text + behind]) == (text + behind, [])


@given(st.text(st.sampled_from('<tool_call>/{}"name: \n,arguments'), max_size=60), st.lists(st.integers(0, 60)))
def test_no_text_is_lost_where_nothing_is_called(text, at) -> None:
    found, calls = summed(ToolParser({}), cut(text, at))
    assert (found, calls) == (text, [])


@pytest.mark.parametrize("arguments", ['{"city": Paris}', '{"city": "Par', '{"a": ]'])
def test_arguments_that_are_no_json(arguments) -> None:
    """Whole, the call stays text; a stream, which has begun it, knows that it is broken."""
    text = call("weather", arguments)
    parser = ToolParser(NAMES, whole=True)
    assert summed(parser, [text]) == (text, []) and parser.calls == 0
    streamed = ToolParser(NAMES)
    (name, spelled), *_ = summed(streamed, list(text))[1]
    assert streamed.broken and name == "weather" and spelled.startswith(arguments)


def test_only_the_first_call_unless_several_may_be() -> None:
    text = call("now", "{}") + "\n" + call("weather", PARIS)
    assert summed(ToolParser(NAMES, several=False), list(text)) == ("", [("now", "{}")])


def test_the_name_comes_before_the_arguments_and_these_as_they_are_made() -> None:
    parser = ToolParser(NAMES)
    pieces = [p for c in call("weather", PARIS) for p in parser.push(c)]
    assert pieces[0] == CallBegins(0, "weather")
    assert pieces[1:] == [ArgumentsPiece(0, c) for c in PARIS]
    json.loads(PARIS)
