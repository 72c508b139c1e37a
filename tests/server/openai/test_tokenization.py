"""/tokenize, /detokenize and /tokenizer_info: tokens there and back, as the completions see them."""

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.serving import LIMITS, TEMPLATE, async_llm, server


@pytest.fixture(scope="module")
def address():
    config = {"bos_token": None, "eos_token": {"content": "<end>", "special": True}, "model_max_length": 9}
    with server(async_llm(), tokenizer_config=config) as address:
        yield address


def post(address: str, path: str, status: int = 200, **body) -> dict:
    answer = httpx.post(f"{address}/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_there_and_back(address) -> None:
    found = post(address, "tokenize", prompt="hello", model="mini", return_token_strs=True)
    assert found == {
        "count": 5,
        "max_model_len": LIMITS.max_seq_len,
        "tokens": list(b"hello"),
        "token_strs": list("hello"),
    }
    assert post(address, "detokenize", tokens=found["tokens"]) == {"prompt": "hello"}
    assert post(address, "tokenize", prompt="")["tokens"] == []


def test_messages_are_the_prompt_of_a_chat(address) -> None:
    messages = [{"role": "user", "content": "hi"}]
    found = post(address, "tokenize", messages=messages)
    assert bytes(found["tokens"]).decode() == "<user>hi\n<assistant>" and found["token_strs"] is None
    chat = post(address, "v1/chat/completions", model="mini", messages=messages, max_tokens=1)
    assert chat["usage"]["prompt_tokens"] == found["count"]
    without = post(address, "tokenize", messages=messages, add_generation_prompt=False)
    assert bytes(without["tokens"]).decode() == "<user>hi\n"


def test_the_tokenizer(address) -> None:
    info = httpx.get(f"{address}/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["model_max_length"]) == ("<end>", None, 9)
    assert info["chat_template"] == TEMPLATE and info["tokenizer_class"] == "ByteTokenizer"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("tokenize", {}, "Give either prompt or messages"),
        ("tokenize", {"prompt": "a", "messages": []}, "Give either prompt or messages"),
        ("tokenize", {"prompt": [1]}, "prompt"),
        ("detokenize", {"tokens": [-1]}, "-1 is not a token id"),
        ("detokenize", {"tokens": [2**70]}, "is not a token id"),
        ("detokenize", {}, "tokens"),
    ],
)
def test_bad_bodies(address, path, body, message) -> None:
    assert message in post(address, path, 400, **body)["error"]["message"]
