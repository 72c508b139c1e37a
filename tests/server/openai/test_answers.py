"""The events of a stream: those of plain text are rendered around it, and are the same as any others."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jet_export.runtime.params import Logprob, Output
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.server.openai.answers import ChatAnswer, CompletionAnswer, event

NAME = 'a "model"\0\\'


def answers() -> list[ChatAnswer | CompletionAnswer]:
    prompts = [[1], [2]]
    return [ChatAnswer(NAME, ByteTokenizer(), prompts), CompletionAnswer(NAME, ByteTokenizer(), prompts, None)]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(0, 1))
def test_an_event_of_text_is_the_general_one(text, index) -> None:
    for answer in answers():
        for part in (text, "x", text):  # the second and third time around what is kept
            output = Output(65, part)
            found = answer.event(index, output)
            assert found == event(answer.chunk(answer.delta(index, output)))
            assert found.count("\n") == 2 and json.loads(found.removeprefix("data: "))["model"] == NAME


@pytest.mark.parametrize("kind", [0, 1])
def test_what_has_an_event(kind) -> None:
    answer = answers()[kind]
    assert answer.event(0, Output(65)) == ""
    assert '"finish_reason":"length"' in answer.event(0, Output(66, finish_reason="length"))
    assert '"logprob' in answer.event(1, Output(67, logprob=Logprob(-1.0, ())))
    assert answer.usage()["completion_tokens"] == 3
