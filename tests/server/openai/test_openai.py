"""The OpenAI client against a real server: answers equal LLM.generate's, streamed or whole, alone or among many."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from helpers.eager_bundle import eager_llm  # noqa: E402
from helpers.serving import LIMITS, async_llm, server  # noqa: E402


@pytest.fixture(scope="module")
def reference():
    return eager_llm(LIMITS)


@pytest.fixture(scope="module")
def llm():
    return async_llm(max_waiting=128)


@pytest.fixture(scope="module")
def address(llm):
    with server(llm) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(autouse=True)
def returns_to_where_it_was(llm):
    """After every test nothing runs or waits, and all slots and pages are free."""
    yield
    deadline = time.monotonic() + 10
    s = llm.batching.scheduler
    while s.running or s.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert s.slots.used == s.memory.requests_pages == s.window_pages.used == len(llm.batching.sequences) == 0


def greedy(client, prompt, n: int, **more):
    return client.completions.create(model="mini", prompt=prompt, max_tokens=n, temperature=0, **more)


def test_completion_equals_generate(client, reference) -> None:
    answer = greedy(client, "hello", 12)
    (expected,) = reference.generate("hello", 12)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 12, 17)
    assert answer.object == "text_completion" and answer.model == "mini"
    nothing = greedy(client, "hello", 12, extra_body={"logit_bias": None, "suffix": None})
    assert nothing.choices[0].text == expected.text


def test_stream_is_the_whole_in_parts(client) -> None:
    chunks = list(greedy(client, [5, 6, 7], 12, stream=True, stream_options={"include_usage": True}))
    *parts, usage = chunks
    assert "".join(c.choices[0].text for c in parts) == greedy(client, [5, 6, 7], 12).choices[0].text
    assert [c.choices[0].finish_reason for c in parts[-2:]] == [None, "length"]
    assert len(parts) > 3 and len({c.id for c in chunks}) == 1
    assert usage.choices == [] and usage.usage.completion_tokens == 12


def test_several_prompts_come_back_in_order(client, reference) -> None:
    prompts = ["one", "two, longer", "3", "the fourth", "and a fifth"]
    answer = greedy(client, prompts, 6)
    assert [c.index for c in answer.choices] == list(range(5))
    assert [c.text for c in answer.choices] == [c.text for c in reference.generate(prompts, 6)]
    streamed = [""] * 5
    for chunk in greedy(client, prompts, 6, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [c.text for c in answer.choices]


def test_sampling_parameters_reach_the_engine(client, reference) -> None:
    hot = {"temperature": 1.3, "top_p": 0.9, "seed": 11}
    (expected,) = reference.generate("abc", 20, top_k=40, **hot)
    answer = client.completions.create(model="mini", prompt="abc", max_tokens=20, extra_body={"top_k": 40}, **hot)
    assert answer.choices[0].text == expected.text
    cut = client.completions.create(
        model="mini", prompt="abc", max_tokens=20, extra_body={"top_k": 40}, stop=expected.text[8:11], **hot
    )
    assert cut.choices[0].text == expected.text[: expected.text.index(expected.text[8:11])]
    assert cut.choices[0].finish_reason == "stop"
    first = {client.completions.create(model="mini", prompt="abc", max_tokens=9).choices[0].text for _ in range(3)}
    assert len(first) > 1  # no seed: a random one each time


def test_logprobs_and_echo(client, reference) -> None:
    answer = greedy(client, "abc", 4, logprobs=3).choices[0]
    (expected,) = reference.generate("abc", 4, return_logits=True)
    p = expected.logits.log_softmax(-1)
    assert answer.logprobs.token_logprobs == pytest.approx([float(p[i].max()) for i in range(4)], abs=1e-4)
    assert [len(t) for t in answer.logprobs.top_logprobs] == [3] * 4
    assert "".join(answer.logprobs.tokens) == answer.text
    parts = list(greedy(client, "abc", 4, logprobs=3, stream=True))
    assert [c.choices[0].logprobs.text_offset[0] for c in parts] == answer.logprobs.text_offset
    assert greedy(client, "abc", 4, echo=True).choices[0].text == "abc" + answer.text
    assert "".join(c.choices[0].text for c in greedy(client, "abc", 4, echo=True, stream=True)) == "abc" + answer.text


def test_chat_goes_through_the_template(client, reference) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    (expected,) = reference.generate("<system>be brief\n<user>hi\n<assistant>", 10)
    whole = client.chat.completions.create(
        model="mini", messages=messages, temperature=0, max_completion_tokens=10, logprobs=True, top_logprobs=2
    )
    assert whole.choices[0].message.content == expected.text
    assert len(whole.choices[0].logprobs.content) == 10
    chunks = list(
        client.chat.completions.create(model="mini", messages=messages, temperature=0, max_tokens=10, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"
    unlimited = client.chat.completions.create(model="mini", messages=messages[1:], temperature=0)
    assert unlimited.usage.total_tokens == LIMITS.max_seq_len
    with pytest.raises(openai.BadRequestError, match="no developers here"):
        client.chat.completions.create(model="mini", messages=[{"role": "developer", "content": "x"}])


def test_models_health_and_metrics(client, address) -> None:
    assert [m.id for m in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").id == "mini"
    with pytest.raises(openai.NotFoundError, match="'org/other' is not served here"):
        client.models.retrieve("org/other")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    greedy(client, "abc", 3)
    text = httpx.get(f"{address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['jet_requests_total{reason="length"}']) >= 1
    assert float(values["jet_slots_used"]) == 0 and float(values["jet_slots"]) == 4
    assert float(values["jet_tokens_total"]) >= 3 and float(values["jet_tokens_per_second"]) > 0
    for name in ("jet_ttft_seconds", "jet_tpot_seconds"):
        assert float(values[f'{name}_bucket{{le="+Inf"}}']) == float(values[f"{name}_count"]) > 0


def test_sixty_four_streams_at_once(client, reference) -> None:
    """Mixed lengths, and a few readers that disconnect after three chunks: the others get the text they get alone."""
    prompts = [[(7 * i + j) % 128 for j in range(1 + 3 * i)] for i in range(64)]

    def read(i: int) -> str:
        text = ""
        with greedy(client, prompts[i], 3 + i % 7, stream=True) as stream:
            for n, chunk in enumerate(stream):
                if i % 9 == 0 and n == 2:
                    return "left"
                text += chunk.choices[0].text
        return text

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(read, range(64)))
    for i, text in enumerate(texts):
        if text != "left":
            assert text == reference.generate([prompts[i]], 3 + i % 7)[0].text
    assert texts.count("left") >= 5


def test_a_client_that_disconnects_cancels_its_request(client, llm) -> None:
    before = llm.batching.metrics.requests["cancelled"]
    with greedy(client, "abc", 390, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        greedy(client.with_options(timeout=0.2), "abc", 390)
    deadline = time.monotonic() + 5
    while llm.batching.metrics.requests["cancelled"] < before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_queue_is_answered_429_and_a_timeout_503() -> None:
    llm = async_llm(slots=1, max_waiting=1, wait_timeout=0.3)
    with server(llm, template=None) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with greedy(client, "abc", 390, stream=True) as running, ThreadPoolExecutor(1) as pool:
            next(iter(running))
            waiting = pool.submit(greedy, client, "abc", 3, stream=True)
            while not llm.batching.scheduler.waiting:
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
                greedy(client, "abc", 3)
            assert [r.prompt_len for r in llm.batching.scheduler.waiting] == [3]
            with pytest.raises(openai.InternalServerError, match="waited too long") as e:
                waiting.result()
            assert e.value.status_code == 503
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="mini", messages=[{"role": "user", "content": "x"}])
