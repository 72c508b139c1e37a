"""Chat templates: where they are found, what they render, and what they cannot do."""

import json

import pytest

from jet_export.server.openai.chat import ChatTemplate, load_chat_template
from jet_export.utils.errors import JetExportError

USER = [{"role": "user", "content": "hi"}]


def config(directory, **values) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def rendered(directory) -> str:
    template = load_chat_template(directory)
    assert template is not None
    return template(USER)


def test_where_it_is_found(tmp_path) -> None:
    assert load_chat_template(tmp_path) is None
    config(tmp_path, bos_token="<s>")
    assert load_chat_template(tmp_path) is None
    config(tmp_path, bos_token={"content": "<s>"}, chat_template="{{ bos_token }}{{ messages[0]['content'] }}")
    assert rendered(tmp_path) == "<s>hi"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages[0]['role'] }}"}]
    config(tmp_path, chat_template=named)
    assert rendered(tmp_path) == "user"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered(tmp_path) == "file"


def test_equals_transformers() -> None:
    """The dialect: whitespace control, loops, and the prompt for the answer."""
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    source = """{% for m in messages %}
    {%- if loop.first and m['role'] != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
<|im_start|>{{ m['role'] }}
{{ m['content'] | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    messages = [*USER, {"role": "assistant", "content": " hello "}, {"role": "user", "content": "é?"}]
    (expected,), _ = transformers.render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
    assert ChatTemplate(source, {})(messages) == expected


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no') }}", "{{ messages[0]['role'] + 1 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"],
)
def test_a_template_that_fails_or_leaves_the_sandbox_is_refused(source: str) -> None:
    with pytest.raises(JetExportError, match="refuses these messages"):
        ChatTemplate(source, {})(USER)


def test_no_template() -> None:
    with pytest.raises(JetExportError, match="no template"):
        ChatTemplate("{% if %}", {})


def test_developers_are_the_system_of_a_template_that_does_not_know_them() -> None:
    messages = [{"role": "developer", "content": "be brief"}]
    assert ChatTemplate("{{ messages[0].role }}", {})(messages) == "system"
    assert ChatTemplate("{% if false %}developer{% endif %}{{ messages[0].role }}", {})(messages) == "developer"


def test_json_is_as_transformers_writes_it() -> None:
    """The keys in their order, and nothing escaped for HTML."""
    assert ChatTemplate("{{ messages[0] | tojson }}", {})([{"role": "<é>", "a": "'"}]) == '{"role": "<é>", "a": "\'"}'


def test_tools_need_a_template_that_has_them() -> None:
    tools = [{"type": "function"}]
    assert ChatTemplate("{{ tools | length }}", {})(USER, tools=tools) == "1"
    with pytest.raises(JetExportError, match="no place for them"):
        ChatTemplate("{% set tools = 1 %}{{ tools }}", {})(USER, tools=tools)
