"""`echo` with `logprobs`: the log probabilities of a prompt's tokens, as lm-evaluation-harness asks for them."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

pytest.importorskip("fastapi")

from helpers.eager_bundle import eager_engine
from helpers.serving import LIMITS, async_llm, server

from jet_export.runtime import logprobs, scoring
from jet_export.runtime.runner import Runner

PROMPTS = [[(7 * i * i + n) % 128 for i in range(n)] for n in (1, 2, 65, 200)]  # of one to four chunks


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """ln of the probabilities of the token behind each, from one forward pass: [n, vocab] for each prompt"""
    rows = []
    for prompt in PROMPTS:
        runner = Runner(eager_engine(LIMITS))
        rows.append(runner.prefill([0], [prompt], all_logits=True).log_softmax(-1))
    return rows


@pytest.fixture(scope="module", params=[False, True], ids=["batched", "deterministic"])
def address(request):
    with server(async_llm(deterministic=request.param)) as address:
        yield address


def score(address: str, prompt, **changes) -> list[dict]:
    """The choices."""
    body = {"model": "mini", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json={**body, **changes}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.parametrize(("tokens", "rows"), [(None, 64), (16, 5)])
def test_the_log_probabilities_are_those_of_one_forward_pass(address, expected, monkeypatch, tokens, rows) -> None:
    if tokens:
        monkeypatch.setattr(scoring, "LOGITS_BYTES", tokens * 128 * 4)
    monkeypatch.setattr(logprobs, "ROWS", rows)
    for prompt, row, choice in zip(PROMPTS, expected, score(address, PROMPTS, logprobs=2), strict=True):
        found = choice["logprobs"]
        n = len(prompt)
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == n + 1
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        chosen = [float(row[i, prompt[i + 1]]) for i in range(n - 1)] + [float(row[-1].max())]
        assert found["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-4)
        for i, top in enumerate(found["top_logprobs"][1:]):
            assert list(top.values()) == pytest.approx(row[i].topk(2).values.flip(0).tolist(), abs=1e-4)
        assert choice["text"] == "".join(found["tokens"])
        assert [choice["text"][at:].startswith(t) for at, t in zip(found["text_offset"], found["tokens"], strict=True)]


def test_the_most_likely_token_has_the_largest_of_top_logprobs(address) -> None:
    """The harness compares the two for equality to tell whether a continuation is greedy."""
    (greedy,) = score(address, [5, 6, 7], max_tokens=8, echo=False)
    tokens = greedy["logprobs"]["tokens"]
    (choice,) = score(address, [5, 6, 7, *(ord(t) if len(t) == 1 else int(t[1:-1]) for t in tokens)])
    found = choice["logprobs"]
    pairs = list(zip(found["token_logprobs"], found["top_logprobs"], strict=True))
    assert all(p == max(top.values()) for p, top in pairs[3:])


def test_no_completion_is_asked_for(address) -> None:
    for prompt in PROMPTS:
        (one,), (none,) = score(address, prompt), score(address, prompt, max_tokens=0)
        assert none["finish_reason"] == "length"
        assert none["logprobs"] == {name: values[:-1] for name, values in one["logprobs"].items()}
        assert none["text"] == "".join(none["logprobs"]["tokens"])
    body = {"model": "mini", "prompt": "abc", "echo": True, "max_tokens": 0}
    answer = httpx.post(f"{address}/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "abc" and answer["usage"]["completion_tokens"] == 0


def test_a_stream_has_the_same(address) -> None:
    for n in (0, 3):
        (whole,) = score(address, "hello", max_tokens=n)
        body = {"model": "mini", "prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": n, "temperature": 0}
        text = ""
        joined: dict[str, list] = {name: [] for name in whole["logprobs"]}
        with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    text += choice["text"]
                    for name, values in (choice["logprobs"] or {}).items():
                        joined[name] += values
        assert (text, joined) == (whole["text"], whole["logprobs"])


def test_scores_bypass_the_prefix_cache_and_other_requests_are_as_alone(address) -> None:
    def complete(prompt: list[int]) -> dict:
        body = {"model": "mini", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        return httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()

    alone = [complete(p) for p in PROMPTS]
    scored = score(address, PROMPTS)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(complete, p) for p in PROMPTS]
        again = [pool.submit(score, address, PROMPTS) for _ in range(2)]
        assert [o.result()["choices"] for o in others] == [a["choices"] for a in alone]
        for choices in (a.result() for a in again):
            for a, b in zip(choices, scored, strict=True):
                assert a["logprobs"]["token_logprobs"][1:] == pytest.approx(
                    b["logprobs"]["token_logprobs"][1:], abs=1e-4
                )
    body = {"model": "mini", "prompt": PROMPTS[3], "max_tokens": 1, "echo": True, "logprobs": 1}
    usage = httpx.post(f"{address}/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
