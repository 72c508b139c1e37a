"""tools and tool_choice, with the openai client: what the model is shown, and what becomes of its answer."""

import json

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from fastapi.testclient import TestClient  # noqa: E402
from helpers.paths import ROOT  # noqa: E402
from helpers.scripted_engine import ScriptedEngine  # noqa: E402

from jet_export.runtime.grammar import Grammar  # noqa: E402
from jet_export.server.openai.app import create_app  # noqa: E402
from jet_export.server.openai.chat import ChatTemplate  # noqa: E402
from jet_export.server.openai.options import ApiOptions  # noqa: E402

PUBLISHED = ROOT.parent / "shared" / "tokenizer" / "chat_template.jinja"
TEMPLATE = """{% for tool in tools or [] %}
<tool>{{ tool | tojson }}
{% endfor %}
{% for m in messages %}
<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}

{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "It's <fine>", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
USER = {"role": "user", "content": "Paris?"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def over(engine: ScriptedEngine, template: str = TEMPLATE):
    app = create_app(engine, ApiOptions(names=("mini",)), ChatTemplate(template, {}))
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=TestClient(app)
    ).chat.completions


def ask(engine: ScriptedEngine, **changes):
    body = {"model": "mini", "messages": [USER], "tools": [WEATHER, NOW], **changes}
    return over(engine).create(**body)


def prompt(engine: ScriptedEngine) -> str:
    return bytes(engine.submitted[-1][0][0]).decode()


def test_a_call_whole_and_streamed() -> None:
    text = "One moment.\n" + CALL + "\n" + CALL.replace("Paris", "Rome")
    whole = ask(ScriptedEngine((text, "stop"))).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "One moment."
    calls = [(c.type, c.function.name, json.loads(c.function.arguments)) for c in whole.message.tool_calls]
    assert calls == [("function", "weather", {"city": city}) for city in ("Paris", "Rome")]
    assert len({c.id for c in whole.message.tool_calls}) == 2

    client = over(ScriptedEngine((text, "stop"), lengths=(3, 1, 7)))
    with client.stream(model="mini", messages=[USER], tools=[WEATHER, NOW]) as stream:
        chunks = [e.chunk.choices[0] for e in stream if e.type == "chunk"]
        final = stream.get_final_completion().choices[0]
    assert final.message.content == whole.message.content and final.finish_reason == "tool_calls"
    assert [c.function for c in final.message.tool_calls] != []
    assert [c.function.arguments for c in final.message.tool_calls] == ['{"city": "Paris"}', '{"city": "Rome"}']
    deltas = [d for c in chunks for d in c.delta.tool_calls or []]
    first = [d for d in deltas if d.index == 0]
    assert (first[0].function.name, first[0].function.arguments, first[0].type) == ("weather", "", "function")
    assert first[0].id and all(d.function.name is None and d.id is None for d in first[1:]) and len(first) > 3
    assert chunks[-1].finish_reason == "tool_calls" and {c.finish_reason for c in chunks[:-1]} == {None}


def test_an_answer_without_a_call() -> None:
    answer = ask(ScriptedEngine((" It is 2 < 3. ", "stop"))).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (" It is 2 < 3. ", None, "stop")


@pytest.mark.parametrize("text", [CALL[:-20], CALL.replace('"Paris"', "Paris"), CALL.replace("weather", "other")])
def test_malformed_calls_stay_content(text) -> None:
    answer = ask(ScriptedEngine((text, "length"))).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (text, None, "length")
    chunks = list(ask(ScriptedEngine((text, "stop")), stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_each_of_several_answers_has_its_calls() -> None:
    engine = ScriptedEngine((CALL, "stop"), ("none", "stop"), lengths=(5,))
    whole = ask(engine, n=3)
    assert [bool(c.message.tool_calls) for c in whole.choices] == [True, False, True]
    assert [c.finish_reason for c in whole.choices] == ["tool_calls", "stop", "tool_calls"]
    reasons = {c.choices[0].index: c.choices[0].finish_reason for c in ask(engine, n=3, stream=True)}
    assert reasons == {0: "tool_calls", 1: "stop", 2: "tool_calls"}


def test_what_the_model_is_shown() -> None:
    engine = ScriptedEngine(("ok", "stop"))
    ask(engine)
    shown = f"<tool>{json.dumps(WEATHER)}\n<tool>{json.dumps(NOW)}\n"
    assert prompt(engine) == shown + "<user>Paris?\n<assistant>"
    ask(engine, tool_choice="none")
    assert prompt(engine) == "<user>Paris?\n<assistant>"
    ask(engine, tool_choice={"type": "function", "function": {"name": "now"}})
    assert prompt(engine).startswith(shown)


def test_the_answer_of_one_turn_goes_into_the_next() -> None:
    engine = ScriptedEngine((CALL, "stop"))
    answer = ask(engine).choices[0].message
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "sunny"}
    ask(engine, messages=[USER, answer, result])
    assert prompt(engine).endswith(f"<user>Paris?\n<assistant>{CALL}\n<tool>sunny\n<assistant>")


def test_tool_choice_none_leaves_the_text_alone() -> None:
    answer = ask(ScriptedEngine((CALL, "stop")), tool_choice="none").choices[0]
    assert answer.message.content == CALL and answer.finish_reason == "stop"


def test_a_response_format_goes_with_the_tool_choices_that_decide() -> None:
    engine = ScriptedEngine((CALL, "stop"))
    form = {"type": "json_object"}
    ask(engine, response_format=form, tool_choice="none")
    assert engine.submitted[-1][1].grammar == Grammar.json_object()
    ask(engine, response_format=form, tool_choice="required")
    assert engine.submitted[-1][1].grammar.kind == "tagged"


def test_strict_functions_keep_to_their_schemas_where_the_model_may_call() -> None:
    engine = ScriptedEngine((CALL, "stop"))
    function = {"name": "weather", "parameters": SCHEMA, "strict": True}
    strict = {"type": "function", "function": function}
    ask(engine, tools=[strict, {"type": "function", "function": {"name": "now", "parameters": {"required": ["x"]}}}])
    asked = engine.submitted[-1][1].grammar
    assert asked is not None
    grammar = json.loads(asked.text)
    assert grammar["free"] and grammar["several"]
    assert [item["schema"] for item in grammar["items"]] == [SCHEMA, {"type": "object"}]
    ask(engine)
    assert engine.submitted[-1][1].grammar is None


def test_parallel_tool_calls() -> None:
    engine = ScriptedEngine((CALL + CALL, "stop"))
    assert len(ask(engine).choices[0].message.tool_calls) == 2
    assert len(ask(engine, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published chat template is not here")
def test_the_published_template() -> None:
    engine = ScriptedEngine((CALL, "stop"))
    answer = over(engine, PUBLISHED.read_text()).create(model="mini", messages=[USER], tools=[WEATHER])
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in prompt(engine)
    call = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "sunny"}
    over(engine, PUBLISHED.read_text()).create(model="mini", messages=[USER, call, result], tools=[WEATHER])
    turns = f"<|im_start|>assistant\n{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>"
    assert turns in prompt(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": [WEATHER, WEATHER]}, "two functions 'weather'"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(200)]}, "at most 128"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x' is not one of tools"),
        ({"tool_choice": "required", "tools": []}, "required needs tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools go with a response_format or grammar only if"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "role user has no tool_calls"),
        ({"messages": [{"role": "assistant"}]}, "content is missing"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "["}}]}
                ]
            },
            "messages.0.tool_calls.0.function.arguments: not a JSON object",
        ),
    ],
)
def test_refusals(changes, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(ScriptedEngine(("", "stop")), **changes)


def test_a_template_without_a_place_for_tools() -> None:
    with pytest.raises(openai.BadRequestError, match="chat template has no place for them"):
        over(ScriptedEngine(("", "stop")), "{{ messages[0].content }}").create(
            model="mini", messages=[USER], tools=[NOW]
        )
