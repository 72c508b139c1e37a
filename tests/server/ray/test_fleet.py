"""Two replicas of jet-tiny on Ray's own cluster: answers, routing, cancellation, refusals, SIGKILL, a rolling update.

The last two change the fleet, so the tests run in this order."""

import json
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import httpx
import pytest

pytest.importorskip("ray")

from helpers.eager_tiny import tiny_llm
from helpers.ray_fleet import Load, fleet

from jet_export.server.openai.options import ApiOptions
from jet_export.server.ray.config import FleetConfig

PATIENCE = 120.0  # seconds, for what takes one on an idle machine
LONG = 200  # tokens of an answer that takes some seconds


@dataclass
class Fleet:
    url: str
    config: FleetConfig

    def complete(self, prompt: str | list[int], tokens: int) -> httpx.Response:
        body = {"model": "jet-tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE)
        assert response.status_code in (200, 429), response.text
        return response

    def stream(self, prompt: str, tokens: int, on_event: Callable[[], None] = lambda: None) -> list[str]:
        """The events' data."""
        body = {"model": "jet-tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        events = []
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE) as response:
            if response.status_code != 200:
                return [response.read().decode()]
            for line in response.iter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                    on_event()
        return events

    def metric(self, name: str) -> dict[str, float]:
        """By replica."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        found = re.findall(rf'^{name}\{{(?:[^}}]*,)?replica="(\w+)"\}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}

    def ended(self, reason: str) -> float:
        """Requests of all replicas."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        return sum(float(n) for n in re.findall(rf'^jet_requests_total\{{reason="{reason}".*\}} (\S+)$', text, re.M))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with fleet(tmp_path_factory.mktemp("fleet"), port) as config:
        yield Fleet(f"http://127.0.0.1:{port}", config)


def until(true: Callable[[], bool]) -> None:
    """Waits for it; a minute is long enough for what takes a second."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_answers_are_the_engines_and_both_replicas_give_some(served: Fleet) -> None:
    prompts = ["def main(", "import os", "class A:", "for i in", "return x", "with open("]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [r.json()["choices"][0]["text"] for r in pool.map(lambda p: served.complete(p, 12), prompts)]
    llm = tiny_llm()
    expected = [c.text for c in llm.generate(prompts, 12)]
    assert answers == expected
    until(lambda: sum(served.metric("jet_tokens_total").values()) >= 12 * len(prompts))
    assert len([n for n in served.metric("jet_tokens_total").values() if n]) == 2
    events = served.stream("def main(", 12)
    assert events[-1] == "[DONE]" and "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1]) == answers[0]


def test_a_prompt_that_begins_alike_goes_where_its_prefix_is(served: Fleet) -> None:
    before = served.metric("jet_prefix_tokens_total")
    prompt = [5] * 140  # more than a page
    for i in range(3):
        usage = served.complete([*prompt, 20 + i], 1).json()["usage"]
        # The second prompt that begins alike caches the page that they share, for the third.
        assert usage["prompt_tokens_details"]["cached_tokens"] == (128 if i == 2 else 0), i
    until(lambda: sum(served.metric("jet_prefix_tokens_total").values()) > sum(before.values()))


def test_a_client_that_leaves_cancels_its_request(served: Fleet) -> None:
    before = served.ended("cancelled")
    body = {"model": "jet-tiny", "prompt": "x", "max_tokens": LONG, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=PATIENCE) as response:
        next(response.iter_lines())
    until(lambda: served.ended("cancelled") > before)


def test_a_full_fleet_says_when_to_come_again(served: Fleet) -> None:
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda i: served.complete(f"x{i}", 40), range(24)))
    codes = Counter(r.status_code for r in answers)
    assert set(codes) == {200, 429} and codes[200] >= 12, codes  # two replicas, four at once and two waiting each
    assert {r.headers.get("retry-after") for r in answers if r.status_code == 429} == {"1"}


def test_after_sigkill_streams_end_and_a_new_replica_comes(served: Fleet) -> None:
    names = set(served.metric("jet_steps_total"))
    started = Counter[int]()

    def one(i: int) -> list[str]:
        return served.stream(f"def f{i}(", LONG if i < 4 else 8, lambda: started.update([i]))

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(one, i) for i in range(4)]
        until(lambda: len(started) == 4)
        load = served.config.load_llm
        assert isinstance(load, Load)
        done = [s.done() for s in streams]
        os.kill(load.pids()[0], signal.SIGKILL)
        late = [pool.submit(one, i) for i in range(4, 6)]  # while the router does not know yet
        ended, later = [s.result() for s in streams], [s.result() for s in late]
    last = [e[-1] for e in ended]
    lost = [json.loads(e)["error"]["code"] for e in last if e != "[DONE]"]
    assert set(lost) <= {"engine_error"} and len(lost) < 4 and (lost or any(done))
    assert [e[-1] for e in later] == ["[DONE]"] * 2
    until(
        lambda: len(set(served.metric("jet_steps_total")) - names) == 1 and len(served.metric("jet_steps_total")) == 2
    )


def test_a_bundle_is_replaced_under_load_with_no_failed_request(served: Fleet) -> None:
    from ray import serve

    from jet_export.server.ray.app import APP, application

    over = False

    def load() -> Counter[int]:
        codes = Counter[int]()
        while not over:
            codes[served.complete("import", 6).status_code] += 1
        return codes

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(load) for _ in range(2)]
        try:
            new = replace(served.config, api=ApiOptions(names=("jet-tiny", "new")))
            serve.run(application(new), name=APP, route_prefix="/")
        finally:
            over = True
        codes = sum((c.result() for c in clients), Counter[int]())
    assert set(codes) == {200}
    models = httpx.get(f"{served.url}/v1/models", timeout=PATIENCE).json()["data"]
    assert [m["id"] for m in models] == ["jet-tiny", "new"]
