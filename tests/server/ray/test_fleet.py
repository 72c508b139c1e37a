"""Two replicas of jet-tiny on two nodes of Ray's own cluster: answers, routing, cancellation, refusals; SIGKILL of a
replica, of the proxy and of a node under 64 streams; a rolling update under load.

The last ones change the fleet, so the tests run in this order. `make cluster` runs all of them; those of the proxy, the
node and the update wait for Ray's own clocks a minute each, so they run only there."""

import json
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray")

from helpers.ray_cluster import RayNode
from helpers.ray_fleet import SLOTS, WAITING, Load, expected, fleet, run

from jet_export.server.openai.options import ApiOptions
from jet_export.server.ray.config import FleetConfig

PATIENCE = 120.0  # seconds, for what takes one on an idle machine
LONG = 150  # tokens of an answer that does not end while the engines are held
STREAMS = 64
waits_for_ray = pytest.mark.skipif("JET_CLUSTER" not in os.environ, reason="waits for Ray's clocks: make cluster")


@dataclass
class Streams:
    """64 of them at once, each of LONG tokens."""

    pool: ThreadPoolExecutor
    go_on: Callable[[], None]
    begun: Counter[int] = field(default_factory=Counter)  # events by stream
    results: list[Future[list[str]]] = field(default_factory=list)

    def ends(self) -> Counter[str]:
        """How many ended as they should, with an error, or without their connection."""
        return Counter(end_of(r.result(PATIENCE)) for r in self.results)


def end_of(events: list[str]) -> str:
    if not events or events[-1] == "[DONE]":
        return events[-1] if events else "cut"
    data = json.loads(events[-1])
    return str(data["error"]["code"]) if "error" in data else "cut"


@dataclass
class Fleet:
    url: str
    config: FleetConfig
    nodes: list[RayNode]

    @property
    def load(self) -> Load:
        assert isinstance(self.config.load_llm, Load)
        return self.config.load_llm

    @contextmanager
    def streams(self) -> Iterator[Streams]:
        """All begun that can run at once, which the replicas have reported."""
        with ThreadPoolExecutor(STREAMS + 1) as pool, self.load.held() as go_on:
            streams = Streams(pool, go_on)
            for i in range(STREAMS):
                count = partial(streams.begun.update, [i])
                streams.results.append(pool.submit(self.stream, f"def f{i}(", LONG, count))
            until(lambda: len(streams.begun) == 2 * SLOTS, lambda: (len(streams.begun), self.requests()))
            until(lambda: self.requests() == ([SLOTS] * 2, [STREAMS // 2 - SLOTS] * 2), self.requests)
            assert not any(r.done() for r in streams.results)
            yield streams

    def complete(self, prompt: str | list[int], tokens: int) -> httpx.Response:
        body = {"model": "jet-tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE)
        assert response.status_code in (200, 429), response.text
        return response

    def answers(self) -> bool:
        """A new proxy knows no routes at first, and answers 404."""
        body = {"model": "jet-tiny", "prompt": "after", "max_tokens": 1}
        with suppress(httpx.TransportError):
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE).status_code == 200
        return False

    def stream(self, prompt: str, tokens: int, on_event: Callable[[], None] = lambda: None) -> list[str]:
        """The events' data."""
        body = {"model": "jet-tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        events = []
        with (
            suppress(httpx.RemoteProtocolError, httpx.ReadError),  # the proxy was killed
            httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE) as response,
        ):
            assert response.status_code == 200, response.read()
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

    def requests(self) -> tuple[list[float], list[float]]:
        """Of each replica: those that run, and those that wait."""
        names = ("jet_requests_running", "jet_requests_waiting")
        running, waiting = (sorted(self.metric(name).values()) for name in names)
        return running, waiting

    def ended(self, reason: str) -> float:
        """Requests of all replicas."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        return sum(float(n) for n in re.findall(rf'^jet_requests_total\{{reason="{reason}".*\}} (\S+)$', text, re.M))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with fleet(tmp_path_factory.mktemp("fleet"), port) as (config, nodes):
        yield Fleet(f"http://127.0.0.1:{port}", config, nodes)


def until(true: Callable[[], bool], seen: Callable[[], object] = str) -> None:
    """Waits for it, as long as PATIENCE; `seen`: what to say otherwise."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, seen()
        time.sleep(0.1)


def test_answers_are_the_engines_and_both_replicas_give_some(served: Fleet) -> None:
    prompts = ["def main(", "import os", "class A:", "for i in", "return x", "with open("]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [r.json()["choices"][0]["text"] for r in pool.map(lambda p: served.complete(p, 12), prompts)]
    assert answers == expected(prompts, 12)
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
    with (
        served.load.held(),
        httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=PATIENCE) as response,
    ):
        next(response.iter_lines())
    until(lambda: served.ended("cancelled") == before + 1)


def test_a_full_fleet_says_when_to_come_again(served: Fleet) -> None:
    clients = 2 * int(1.25 * (SLOTS + WAITING)) + 16  # Serve lets a replica have some that its engine refuses
    room = 2 * (SLOTS + WAITING)
    with ThreadPoolExecutor(clients) as pool, served.load.held() as go_on:
        answers = [pool.submit(served.complete, f"x{i}", 20) for i in range(clients)]
        until(lambda: sum(a.done() for a in answers) == clients - room)
        go_on()
        codes = Counter(a.result().status_code for a in answers)
    assert codes == {200: room, 429: clients - room}
    assert {r.headers.get("retry-after") for a in answers if (r := a.result()).status_code == 429} == {"1"}


def statuses() -> str:
    """What Serve says of its deployments."""
    from ray import serve

    return str(serve.status().applications)


def both_again(served: Fleet, before: set[str]) -> None:
    """One replica is new, reports, and gets calls: a replica reports before it is ready and the ingress knows of it."""

    def replaced() -> bool:
        now = set(served.metric("jet_steps_total"))
        return len(now) == 2 and len(now - before) == 1

    until(replaced, lambda: (before, served.metric("jet_steps_total"), statuses()))

    def both_get_some() -> bool:
        tokens = served.metric("jet_tokens_total")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: served.complete(f"x{i}", 8), range(8)))
        time.sleep(1.5)  # they report every second; where it is later, this is tried again
        return all(n > tokens.get(name, 0) for name, n in served.metric("jet_tokens_total").items())

    until(both_get_some)


def test_a_killed_replica_ends_its_streams_and_what_has_sent_nothing_goes_elsewhere(served: Fleet) -> None:
    before = served.metric("jet_steps_total")
    with served.streams() as streams:
        killed, lost = max(served.metric("jet_requests_running").items(), key=lambda x: x[1])
        os.kill(served.load.process(killed), signal.SIGKILL)
        late = streams.pool.submit(served.complete, "late", 8)  # while the router may not know yet
        streams.go_on()
        assert streams.ends() == {"engine_error": lost, "[DONE]": STREAMS - lost}
        assert late.result().status_code == 200
    both_again(served, set(before))


@waits_for_ray
def test_a_killed_proxy_ends_its_connections_and_comes_again(served: Fleet) -> None:
    with served.streams() as streams:
        os.kill(proxy_process(served.nodes[0]), signal.SIGKILL)
        streams.go_on()
        assert streams.ends() == {"cut": STREAMS}
    until(served.answers)
    until(lambda: sum(served.metric("jet_requests_running").values()) == 0)


@waits_for_ray
def test_a_killed_node_is_done_without(served: Fleet) -> None:
    before = served.metric("jet_steps_total")
    gone = [name for name in before if served.load.raylet(name) == served.nodes[1].raylet]
    assert len(gone) == 1
    with served.streams() as streams:
        lost = served.metric("jet_requests_running")[gone[0]]
        served.nodes[1].kill()
        streams.go_on()
        assert streams.ends() == {"engine_error": lost, "[DONE]": STREAMS - lost}
    both_again(served, set(before))


def proxy_process(head: RayNode) -> int:
    """Of Ray Serve's proxy."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == head.raylet and (directory / "cmdline").read_bytes().startswith(b"ray::ProxyActor"):
                found.append(int(directory.name))
    assert len(found) == 1
    return found[0]


@waits_for_ray
def test_a_bundle_is_replaced_under_load_with_no_failed_request(served: Fleet) -> None:
    over = False

    def load() -> Counter[int]:
        codes = Counter[int]()
        while not over:
            codes[served.complete("import", 6).status_code] += 1
        return codes

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(load) for _ in range(2)]
        try:
            run(replace(served.config, api=ApiOptions(names=("jet-tiny", "new"))))
        finally:
            over = True
        codes = sum((c.result() for c in clients), Counter[int]())
    assert set(codes) == {200}
    models = httpx.get(f"{served.url}/v1/models", timeout=PATIENCE).json()["data"]
    assert [m["id"] for m in models] == ["jet-tiny", "new"]
