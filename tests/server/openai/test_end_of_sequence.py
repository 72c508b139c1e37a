"""Where an answer ends: at the tokens of generation_config.json, and in a chat at the template's end of turn too."""

import json

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.eager_bundle import eager_engine
from helpers.serving import LIMITS, server

from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer, load_eos
from jet_export.server.openai.chat import ChatTemplate
from jet_export.utils.errors import JetExportError

END = "<|im_end|>"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"


class Bytes(ByteTokenizer):
    """Bytes, and END as one token."""

    def __init__(self, end: int) -> None:
        self.special_ids = frozenset([end])

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        before, found, after = text.partition(END)
        return [*before.encode(), *self.special_ids, *after.encode()] if found else list(text.encode())


def serving(tokenizer: ByteTokenizer, eos: list[int]) -> AsyncLLM:
    return AsyncLLM.over(BatchingEngine(eager_engine(LIMITS), tokenizer, eos, Serving(prefix_cache_bytes=0)))


def tokens(address: str, path: str, **more) -> tuple[int, str]:
    """(tokens of the answer, finish reason), greedy"""
    body = {"model": "mini", "max_tokens": 12, "temperature": 0, **more}
    answer = httpx.post(f"{address}/v1/{path}", json=body, timeout=60).json()
    return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]


@pytest.fixture(scope="module")
def greedy() -> list[int]:
    """The tokens after "hi", without an end."""
    engine = BatchingEngine(eager_engine(LIMITS), ByteTokenizer(), -1, Serving())
    sequence = engine.submit(list(b"hi"), Params(12), lambda output: None)
    while engine.step():
        pass
    return sequence.tokens


def test_a_chat_stops_at_the_end_of_turn_and_a_completion_does_not(greedy) -> None:
    end = greedy[4]
    cut = greedy.index(end) + 1
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    with server(serving(Bytes(end), []), TEMPLATE) as address:
        assert tokens(address, "chat/completions", **chat) == (cut, "stop")
        assert tokens(address, "completions", prompt="hi") == (12, "length")
        assert tokens(address, "chat/completions", **chat, ignore_eos=True) == (12, "length")
        late, _ = tokens(address, "chat/completions", **chat, min_tokens=cut + 1)
        assert late > cut


def test_any_of_several_ends_of_sequence_ends_an_answer(greedy) -> None:
    ends = [greedy[6], greedy[3], 127]
    cut = min(greedy.index(e) for e in ends[:2]) + 1
    with server(serving(ByteTokenizer(), ends), None) as address:
        assert tokens(address, "completions", prompt="hi") == (cut, "stop")
        assert tokens(address, "completions", prompt="hi", ignore_eos=True) == (12, "length")
        many = {"stop_token_ids": list(range(40, 62)), "min_tokens": 2}
        refused = httpx.post(f"{address}/v1/completions", json={"model": "mini", "prompt": "hi", **many})
        assert refused.status_code == 400 and "min_tokens with 25" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("source", "ends"),
    [
        (TEMPLATE, (5,)),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ()),  # nothing behind an answer
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ()),  # no special token
        ("{{ raise_exception('no') }}", ()),
        ("{{ messages[0].content }}" + END, ()),  # the answer is not shown
    ],
)
def test_the_end_of_turn_of_a_template(source, ends) -> None:
    assert ChatTemplate(source, {}).turn_ends(Bytes(5)) == ends


def test_special_tokens_of_a_tokenizer_file(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    made.add_special_tokens([END])
    made.add_tokens(["<tool>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.special_ids == {2}
    assert ChatTemplate(TEMPLATE, {}).turn_ends(tokenizer) == (2,)
    assert tokenizer.decode([0, 2]) == "a" and tokenizer.decode_with_special([0, 2]) == f"a {END}"
    assert tokenizer.pieces([0, 2, 99]) == ["a", END, ""]


@pytest.mark.parametrize(
    ("values", "ends"), [(None, (7,)), ({}, (7,)), ({"eos_token_id": 3}, (3,)), ({"eos_token_id": [3, 4]}, (3, 4))]
)
def test_generation_config(tmp_path, values, ends) -> None:
    if values is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert load_eos(tmp_path, 7, 10) == ends


@pytest.mark.parametrize("found", [10, -1, "x", [3, None], True])
def test_a_generation_config_that_names_no_token(tmp_path, found) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(JetExportError, match="not in the vocabulary of 10"):
        load_eos(tmp_path, 7, 10)
