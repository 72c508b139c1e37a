"""The ideal of continuous batching: the simulation's laws on made-up speeds, and speeds of a real engine."""

import random
from dataclasses import replace

import pytest
from helpers.eager_bundle import eager_engine

from jet_export.backends.eager import EagerEngine
from jet_export.bench import ideal
from jet_export.bench.ideal import Speeds, batch_sizes, measure_speeds, simulate
from jet_export.bundle.limits import Limits
from jet_export.utils.errors import JetExportError

SPEEDS = Speeds(step_ms={1: 2.0, 4: 3.0, 16: 5.0}, held_tokens=100, prompt_tokens_per_s=1e4, prompt_shape=(16, 2048))


def work(n: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(1, 400), rng.randint(1, 90)) for _ in range(n)]


def test_one_request_takes_its_prompt_and_a_step_for_each_token_but_the_first() -> None:
    for prompt, new in ((500, 11), (1, 1), (7, 2)):
        found = simulate([(prompt, new)], slots=8, speeds=SPEEDS)
        assert found.seconds == pytest.approx(prompt / 1e4 + (new - 1) * 2e-3)
        assert (found.steps, found.most_at_once) == (new - 1, 1)


def test_equal_requests_share_every_step() -> None:
    found = simulate([(100, 21)] * 4, slots=4, speeds=SPEEDS)
    assert found.seconds == pytest.approx(4 * 100 / 1e4 + 20 * 3e-3) and found.steps == 20
    one_by_one = simulate([(100, 21)] * 4, slots=1, speeds=SPEEDS)
    assert one_by_one.seconds == pytest.approx(4 * (100 / 1e4 + 20 * 2e-3))


def test_a_request_joins_as_soon_as_one_ends() -> None:
    # Two slots: (10, 3) ends after two steps; the third request's prompt then delays the second one.
    found = simulate([(10, 3), (10, 6), (10, 2)], slots=2, speeds=SPEEDS)
    two, one = SPEEDS.step(2), SPEEDS.step(1)
    assert found.decode_seconds == pytest.approx(2 * two + two + 2 * one) and found.steps == 5


@pytest.mark.parametrize("slots", [1, 3, 16, 100])
@pytest.mark.parametrize("arrive", [False, True])
def test_laws_of_every_simulation(slots, arrive) -> None:
    requests = work(60, slots)
    due = sorted(random.Random(1).uniform(0, 3) for _ in requests) if arrive else None
    found = simulate(requests, slots=slots, speeds=SPEEDS, due=due)
    assert found.most_at_once <= slots and (arrive or found.most_at_once == min(slots, 60))
    assert (found.prompt_tokens, found.new_tokens) == tuple(map(sum, zip(*requests, strict=True)))
    assert found.prompt_seconds == pytest.approx(found.prompt_tokens / 1e4)
    # Every new token but the first of each request takes a row of some step.
    rows = found.new_tokens - len(requests)
    assert rows / found.most_at_once <= found.steps <= rows
    busy = found.prompt_seconds + found.decode_seconds
    assert found.seconds >= (max(due) if due else 0) and found.seconds >= busy - 1e-9
    assert arrive or found.seconds == pytest.approx(busy)
    assert found.tokens_per_s == pytest.approx(found.new_tokens / found.seconds)


def test_each_speed_scales_its_own_share() -> None:
    requests = work(40)
    once = simulate(requests, slots=8, speeds=SPEEDS)
    slow = simulate(requests, slots=8, speeds=replace(SPEEDS, step_ms={n: 2 * t for n, t in SPEEDS.step_ms.items()}))
    assert slow.decode_seconds == pytest.approx(2 * once.decode_seconds)
    assert slow.prompt_seconds == pytest.approx(once.prompt_seconds) and slow.steps == once.steps
    fast = simulate(requests, slots=8, speeds=replace(SPEEDS, prompt_tokens_per_s=4e4))
    assert fast.prompt_seconds == pytest.approx(once.prompt_seconds / 4)
    assert fast.decode_seconds == pytest.approx(once.decode_seconds)


def test_requests_that_are_not_due_wait_and_the_engine_idles() -> None:
    found = simulate([(10, 2), (10, 2)], slots=4, speeds=SPEEDS, due=[0.0, 5.0])
    assert found.seconds == pytest.approx(5.0 + 1e-3 + 2e-3) and found.most_at_once == 1


def test_steps_between_measured_sizes_are_linear_and_beyond_them_constant() -> None:
    assert [SPEEDS.step(n) for n in (1, 4, 16)] == pytest.approx([2e-3, 3e-3, 5e-3])
    assert SPEEDS.step(10) == pytest.approx(4e-3) and SPEEDS.step(3) == pytest.approx(2e-3 + 2 / 3 * 1e-3)
    assert SPEEDS.step(99) == pytest.approx(5e-3)
    assert replace(SPEEDS, step_ms={8: 3.0}).step(1) == pytest.approx(3e-3)


def test_results_have_the_share_that_was_achieved() -> None:
    found = simulate([(100, 11)], slots=1, speeds=SPEEDS)
    assert found.to_dict(found.tokens_per_s / 2)["achieved"] == pytest.approx(0.5)
    assert "achieved" not in found.to_dict() and found.to_dict()["seconds"] == found.seconds


def test_sizes_measured_reach_the_slots() -> None:
    assert batch_sizes(1) == [1] and batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(64) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    assert batch_sizes(100)[-3:] == [64, 96, 100]


def test_bad_sizes_are_refused() -> None:
    for requests, slots in (([], 1), ([(1, 1)], 0), ([(0, 5)], 1), ([(5, 0)], 1)):
        with pytest.raises(JetExportError, match="every size must be at least 1"):
            simulate(requests, slots=slots, speeds=SPEEDS)
    with pytest.raises(JetExportError, match="not positive"):
        replace(SPEEDS, step_ms={1: 0.0})
    with pytest.raises(JetExportError, match="5 at once; the bundle's max_batch_size is 2"):
        measure_speeds(eager_engine(Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=32)), [5], held_tokens=8)


def test_speeds_of_an_engine_are_those_of_the_clock_given(device, monkeypatch) -> None:
    monkeypatch.setattr(ideal, "REPEATS", 1)
    engine = eager_engine(Limits(max_batch_size=3, max_seq_len=64, prefill_chunk=32), device=device)
    ticks = iter(range(10**6))
    speeds = measure_speeds(engine, [1, 3], held_tokens=500, now=lambda: float(next(ticks)))  # each read a second later
    assert speeds.step_ms == {1: 125.0, 3: 125.0}  # eight steps between two reads
    spaced = EagerEngine(engine.model, engine.limits, state_interval=3)
    speeds_spaced = measure_speeds(spaced, [1], held_tokens=500, now=lambda: float(next(ticks)))
    assert speeds_spaced.step_ms == {1: pytest.approx(1e3 / 9)}  # three intervals
    assert speeds.held_tokens == 55 and speeds.prompt_shape == (3, 62) and speeds.prompt_tokens_per_s == 3 * 62
