"""`n`: several answers to a prompt, which runs once."""

import json

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.eager_bundle import eager_engine
from helpers.serving import LIMITS, async_llm, server, wait_until

from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.tokenizer import ByteTokenizer


def prompt(seed: int, n: int = 100) -> list[int]:
    return [(seed + 7 * i * i + 3 * i) % 128 for i in range(n)]


@pytest.fixture(scope="module")
def llm():
    return async_llm()


@pytest.fixture(scope="module")
def address(llm):
    with server(llm) as address:
        yield address


def ask(address: str, **changes) -> dict:
    body = {"model": "mini", "prompt": prompt(0), "max_tokens": 8, "temperature": 1.5, "seed": 3, **changes}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(answer: dict) -> list[str]:
    assert [c["index"] for c in answer["choices"]] == list(range(len(answer["choices"])))
    return [c["text"] for c in answer["choices"]]


def test_the_answers_differ_and_the_first_is_that_of_one(address) -> None:
    several = texts(ask(address, n=4))
    assert len(set(several)) == 4 and texts(ask(address, n=4)) == several
    assert texts(ask(address))[0] == several[0] and texts(ask(address, n=2, best_of=2)) == several[:2]
    assert len(set(texts(ask(address, n=3, temperature=0)))) == 1


def test_every_prompt_has_its_answers_next_to_each_other(address) -> None:
    prompts = [prompt(5, 30), prompt(6, 3)]
    both = texts(ask(address, prompt=prompts, n=2, echo=True))
    assert both == [t for p in prompts for t in texts(ask(address, prompt=p, n=2, echo=True))]


@pytest.mark.parametrize("length", [40, 200])  # of one chunk and of several
def test_the_prompt_runs_once(address, llm, length) -> None:
    before = llm.batching.metrics.prompt_tokens
    answer = ask(address, prompt=prompt(length, length), n=4)
    assert llm.batching.metrics.prompt_tokens - before == length + 3  # and its last token for each, for the logits
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (length, 4 * 8)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_chat_in_a_stream(address) -> None:
    body = {"model": "mini", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1, "n": 3}
    whole = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    parts, roles = [""] * 3, []
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                parts[choice["index"]] += choice["delta"].get("content", "")
                roles += [choice["index"]] if "role" in choice["delta"] else []
    assert parts == [c["message"]["content"] for c in whole["choices"]] and roles == [0, 1, 2]


def test_a_client_that_disconnects_ends_all_of_them(address, llm) -> None:
    body = {"model": "mini", "prompt": prompt(1), "max_tokens": 250, "n": 8, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    wait_until(lambda: not llm.batching.sequences)
    assert llm.batching.scheduler.slots.used == 0


@pytest.mark.parametrize("serving", [{}, {"prefix_cache_bytes": 0}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("steps", [None, 1])
def test_answers_do_not_depend_on_the_first_one(serving, steps) -> None:
    """It is cancelled after so many steps, if any; requests behind them are served too."""
    engine = BatchingEngine(eager_engine(LIMITS), ByteTokenizer(), -1, Serving(**serving))
    params = Params(6, Sampling(temperature=1.5, seed=3), n=3)
    alone = [engine.submit(prompt(2, 150), params, lambda _: None, choice=i) for i in range(3)]
    while engine.step():
        pass
    engine = BatchingEngine(eager_engine(LIMITS), ByteTokenizer(), -1, Serving(**serving))
    first = engine.submit(prompt(2, 150), params, lambda _: None)
    others = [engine.submit(prompt(2, 150), params, lambda _: None, leader=first, choice=i) for i in (1, 2)]
    last = engine.submit(prompt(3, 20), Params(2), lambda _: None)
    for _ in range(0 if steps is None else steps):
        engine.step()
    if steps is not None:
        engine.cancel(first)
    while engine.step():
        pass
    assert [r.tokens for r in others] == [r.tokens for r in alone[1:]] and len(last.tokens) == 2
    assert steps is not None or first.tokens == alone[0].tokens
    assert engine.scheduler.slots.used == engine.scheduler.memory.requests_pages == 0
