"""benchmarks/serving/replica_cost.py: both servers get the same requests in turns; figures of known times."""

import argparse
import asyncio

import pytest
from helpers.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("serving/replica_cost.py")


class Fake:
    def __init__(self, clock, seconds: float, error: str = "") -> None:
        self.clock, self.seconds, self.error = clock, seconds, error
        self.prompts: list[list[int]] = []

    async def run(self, request, trace) -> None:
        self.prompts.append(request.prompt)
        self.clock.skipped += self.seconds
        trace.times, trace.tokens, trace.error = [self.clock.now()], request.new, self.error


def options(**more) -> argparse.Namespace:
    values = {"streams": 4, "prompt_tokens": 8, "output_tokens": 10, "alone": 3, "rounds": 2, "vocab": 50, "seed": 0}
    return argparse.Namespace(**{**values, **more})


class Clock:
    """Only the clients move it."""

    skipped = 0.0

    def now(self) -> float:
        return self.skipped


@pytest.mark.parametrize(("slower", "met"), [(1.05, True), (1.2, False)])
def test_figures_of_known_times(script, monkeypatch, slower: float, met: bool) -> None:
    clock = Clock()
    monkeypatch.setattr(script, "CLOCK", clock)
    plain, ray = Fake(clock, 0.01), Fake(clock, 0.01 * slower)
    found = asyncio.run(script.compare({"plain": plain, "ray": ray}, options()))
    assert plain.prompts == ray.prompts and len(plain.prompts) == 3 * (4 + 3)
    s = found["summary"]
    assert s["plain"]["tokens_per_s"] == pytest.approx(1000) and s["rate"] == pytest.approx(1 / slower)
    assert s["ttft_alone_more_ms"] == pytest.approx(10 * (slower - 1)) and s["met"] == met
    assert [r["server"] for r in found["rows"]] == ["plain", "ray"] * 2


def test_a_failed_request_gives_no_figures(script, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(script, "CLOCK", clock)
    with pytest.raises(SystemExit, match="requests failed: status 429"):
        asyncio.run(script.compare({"plain": Fake(clock, 1, "status 429")}, options()))
