"""Thinking apart from the answer, calls with their parameters in tags, and variables of the chat template."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from fastapi.testclient import TestClient  # noqa: E402
from helpers.scripted_engine import ScriptedEngine  # noqa: E402

from jet_export.server.openai.app import create_app  # noqa: E402
from jet_export.server.openai.chat import ChatTemplate  # noqa: E402
from jet_export.server.openai.options import ApiOptions  # noqa: E402
from jet_export.server.openai.reasoning import ReasoningParser, opens  # noqa: E402
from jet_export.server.openai.tool_stream import ArgumentsPiece, CallBegins, ToolParser  # noqa: E402
from jet_export.utils.errors import JetExportError  # noqa: E402

# As Qwen3.5's: thinking is opened in the prompt, or closed there.
TEMPLATE = """{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "where": {"type": ["object", "null"]},
        "exact": {"anyOf": [{"type": "boolean"}, {"type": "string"}]},
    },
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
USER = {"role": "user", "content": "Paris?"}
CALL = """<tool_call>
<function=weather>
<parameter=city>
123
</parameter>
<parameter=days>
2
</parameter>
<parameter=where>
{"lat": 1.5}
</parameter>
<parameter=exact>
true
</parameter>
</function>
</tool_call>"""
ARGUMENTS = {"city": "123", "days": 2, "where": {"lat": 1.5}, "exact": True}
SCHEMAS = {"weather": SCHEMA, "now": {}}


def cut(text: str, at: list[int]) -> list[str]:
    ends = [0, *sorted(i % (len(text) + 1) for i in at), len(text)]
    return [text[a:b] for a, b in pairwise(ends)]


def split(text: list[str], opened: bool) -> tuple[str, str]:
    parser = ReasoningParser(opened)
    parts = [*map(parser.push, text), parser.flush()]
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts)


ANSWERS = [  # text, opened in the prompt, (reasoning, content)
    ("It is 2 < 3.\n\nSo.\n</think>\n\nYes. ", True, ("It is 2 < 3.\n\nSo.", "Yes. ")),
    ("<think>\nHm\n</think>\n\n<think> </think>", False, ("Hm", "<think> </think>")),
    ("\n <think></think>Yes", False, ("", "Yes")),
    ("\n</think>\n\nYes", True, ("", "Yes")),
    (" Yes, </think> is a mark", False, ("", " Yes, </think> is a mark")),
    ("cut off </thi", True, ("cut off </thi", "")),
    ("cut off \n", True, ("cut off", "")),
    ("<thi", False, ("", "<thi")),
    ("<think>a</think>\n\n", False, ("a", "")),
    ("", True, ("", "")),
]


@pytest.mark.parametrize(("text", "opened", "parts"), ANSWERS)
def test_thinking_ends_where_it_is_closed(text: str, opened: bool, parts: tuple[str, str]) -> None:
    assert split([text], opened) == split(list(text), opened) == parts


@given(st.text(st.sampled_from("<think>/ \na"), max_size=40), st.booleans(), st.lists(st.integers(0, 60), max_size=8))
def test_a_stream_is_split_as_the_whole(text: str, opened: bool, at: list[int]) -> None:
    assert split(cut(text, at), opened) == split([text], opened)


def pieces(text: list[str], schemas: dict[str, Any], whole: bool = False) -> tuple[str, list[tuple[str, str]], bool]:
    """(text, calls, broken)"""
    parser = ToolParser(schemas, whole=whole)
    content, calls = "", list[tuple[str, str]]()
    for piece in [*(p for part in text for p in parser.push(part)), *parser.flush()]:
        if isinstance(piece, CallBegins):
            calls.append((piece.name, ""))
        elif isinstance(piece, ArgumentsPiece):
            calls[-1] = calls[-1][0], calls[-1][1] + piece.text
        else:
            content += piece.text
    return content, calls, parser.broken


@given(st.lists(st.integers(0, 400), max_size=12))
def test_parameters_in_tags_are_arguments_of_their_schemas_types(at: list[int]) -> None:
    code = "<parameter=city>\nif a < b:\n\n</parameter> \n\n</parameter>"  # a value may hold the closing tag
    text = f"One moment.\n{CALL}\n<tool_call><function=now>{code}</function></tool_call>"
    for cuts, whole in ((cut(text, at), False), ([text], True)):
        content, calls, broken = pieces(cuts, SCHEMAS, whole)
        assert (content, broken, [name for name, _ in calls]) == ("One moment.", False, ["weather", "now"])
        assert json.loads(calls[0][1]) == ARGUMENTS and json.dumps(ARGUMENTS) == calls[0][1]
        assert json.loads(calls[1][1]) == {"city": "if a < b:\n\n</parameter> \n"}


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ("<function=now>\n</function>", "{}"),
        ("<function=now></function>", "{}"),
        ("<function=now><parameter=a>\n1\n</parameter>", '{"a": "1"}'),  # without its end
        ("<function=weather><parameter=days>\ntwo\n</parameter></function>", '{"days": "two"}'),
        ("<function=weather><parameter=days>true</parameter></function>", '{"days": "true"}'),
        ("<function=weather><parameter=where>null</parameter></function>", '{"where": null}'),
        ("<function=weather><parameter=exact>NaN</parameter></function>", '{"exact": "NaN"}'),
    ],
)
def test_spellings(inside: str, arguments: str) -> None:
    text = f"<tool_call>\n{inside}\n</tool_call>"
    for cuts, whole in ((list(text), False), ([text], True)):
        content, calls, broken = pieces(cuts, SCHEMAS, whole)
        assert (content, [a for _, a in calls], broken) == ("", [arguments], False)


@pytest.mark.parametrize(
    ("inside", "spelled"),
    [
        ("<function=now>\nnow()\n</function>", ""),
        ("<function=now><parameter=a>1</parameter><parameter=a>2</parameter></function>", '{"a": "1"'),
        ("<function=now>\n<parameter=a>\n1", ""),
    ],
)
def test_what_is_not_in_the_format_stays_text_or_breaks_a_stream(inside: str, spelled: str) -> None:
    text = f"<tool_call>\n{inside}"
    assert pieces([text], SCHEMAS, whole=True) == (text, [], False)
    _, calls, broken = pieces(list(text), SCHEMAS)
    assert calls == [("now", spelled)] and broken
    other = text.replace("function=now", "function=other")
    assert pieces(list(other), SCHEMAS) == (other, [], False)


def over(engine: ScriptedEngine, parser: str | None = "qwen3"):
    app = create_app(engine, ApiOptions(names=("mini",), reasoning_parser=parser), ChatTemplate(TEMPLATE, {"bos": ""}))
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=TestClient(app)
    ).chat.completions


def ask(client: Any, **changes: Any) -> Any:
    return client.create(**{"model": "mini", "messages": [USER], **changes})


def prompt(engine: ScriptedEngine) -> str:
    return bytes(engine.submitted[-1][0][0]).decode()


@pytest.mark.parametrize("lengths", [(1,), (5, 2)])
def test_thinking_and_calls_whole_and_streamed(lengths: tuple[int, ...]) -> None:
    engine = ScriptedEngine((f"Where is <tool_call>?\n</think>\n\nOne moment.\n{CALL}", "stop"), lengths=lengths)
    whole = ask(over(engine), tools=[WEATHER, NOW]).choices[0]
    assert opens(prompt(engine))
    assert whole.message.reasoning_content == "Where is <tool_call>?" and whole.message.content == "One moment."
    (call,) = whole.message.tool_calls
    assert (json.loads(call.function.arguments), whole.finish_reason) == (ARGUMENTS, "tool_calls")
    deltas = [c.choices[0].delta for c in ask(over(engine), tools=[WEATHER, NOW], stream=True)]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == whole.message.reasoning_content
    assert "".join(d.content or "" for d in deltas) == whole.message.content
    arguments = [c.function.arguments for d in deltas for c in d.tool_calls or []]
    assert "".join(arguments) == call.function.arguments


def test_thinking_is_counted_and_scored_as_any_token_is() -> None:
    engine = ScriptedEngine(("ab</think>c", "length"))
    plain, apart = (ask(over(engine, parser)) for parser in (None, "qwen3"))
    assert plain.usage == apart.usage and plain.choices[0].message.content == "ab</think>c"
    assert not hasattr(plain.choices[0].message, "reasoning_content")
    stream = [*ask(over(engine), stream=True, stream_options={"include_usage": True})]
    assert stream[-1].usage == apart.usage
    assert [c.choices[0].finish_reason for c in stream[:-1] if c.choices[0].finish_reason] == ["length"]


def test_all_thinking_is_no_content() -> None:
    message = ask(over(ScriptedEngine(("Hm", "length")))).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm", None)


def test_thinking_is_turned_off_in_the_prompt() -> None:
    engine = ScriptedEngine(("Yes", "stop"))
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    message = ask(over(engine), extra_body=off).choices[0].message
    assert (message.reasoning_content, message.content) == (None, "Yes")
    assert prompt(engine).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "form", [{"response_format": {"type": "json_object"}}, {"tools": [NOW], "tool_choice": "required"}]
)
def test_an_answer_in_a_given_form_has_no_thinking(form: dict[str, Any]) -> None:
    engine = ScriptedEngine(('{"a": 1}', "stop"))
    message = ask(over(engine), **form).choices[0].message
    assert (message.content, message.reasoning_content) == ('{"a": 1}', None) and not opens(prompt(engine))
    with pytest.raises(openai.BadRequestError, match="an answer in a given form has no thinking"):
        ask(over(engine), extra_body={"chat_template_kwargs": {"enable_thinking": True}}, **form)


def test_an_earlier_answers_thinking_goes_through_the_template() -> None:
    engine = ScriptedEngine(("Yes", "stop"))
    for name in ("reasoning_content", "reasoning"):
        ask(over(engine), messages=[USER, {"role": "assistant", "content": "No.", name: "Hm"}, USER])
        assert "<think>\nHm\n</think>\n\nNo.<|im_end|>" in prompt(engine)
    with pytest.raises(openai.BadRequestError, match="role user has no reasoning_content"):
        ask(over(engine), messages=[{**USER, "reasoning_content": "Hm"}])


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos"])
def test_variables_that_the_request_or_the_tokenizer_sets(name: str) -> None:
    with pytest.raises(openai.BadRequestError, match=rf"chat_template_kwargs\.{name}: set by the request"):
        ask(over(ScriptedEngine(("Yes", "stop"))), extra_body={"chat_template_kwargs": {name: "x"}})


def test_an_unknown_parser() -> None:
    with pytest.raises(JetExportError, match=r"--reasoning-parser deepseek: not known\.\nKnown: qwen3"):
        ApiOptions(names=(), reasoning_parser="deepseek")
