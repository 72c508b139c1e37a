"""A simulated replica against BatchingEngine on the same clock: every token at the same time. And runs of equal steps
against single ones."""

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.clock import Clock
from helpers.eager_bundle import mini_config
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import PackedBatch
from jet_export.model.jet_nemotron import random_model
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output, Params
from jet_export.runtime.plan import Capacity, Plan
from jet_export.runtime.step import InFlightStep, StepInputs
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.simulate.cluster import Cluster, ClusterPlan, Outcome
from jet_export.simulate.load import Arrival, Lengths, Poisson
from jet_export.simulate.replica import EngineModel
from jet_export.simulate.step_times import DecodeTimes, PromptTimes, StepTimes, Window

DECODE = DecodeTimes(
    fixed=0.01, fixed_alone=0.007, sequence=0.001, sequence_alone=0.0005, token=1e-6, window=Window(token=2e-6, size=60)
)
TIMES = StepTimes(decode=DECODE, prompts=PromptTimes.affine(0.012, 1e-4), position=1e-7, byte=0.0)
LIMITS = Limits(max_batch_size=4, max_seq_len=640, prefill_chunk=64)


class IdleEngine(EagerEngine):
    """Answers at once, token 0; its states are never touched."""

    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        return torch.zeros(len(logit_indices), self.config.vocab_size)

    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        return torch.zeros(len(input_ids), self.config.vocab_size)


class Served:
    """A load served by the real loop, whose steps take TIMES. `told`: when each request had its tokens."""

    def __init__(self, load: list[Arrival], serving: Serving, overlap: bool) -> None:
        engine = IdleEngine(random_model(mini_config(), torch.float32, "cpu", max_positions=LIMITS.max_seq_len), LIMITS)
        self.clock, self.device, self.left = Clock(), 0.0, list(load)
        self.batching = BatchingEngine(engine, ByteTokenizer(), -1, serving, overlap=overlap, clock=self.clock)
        executor: Any = self.batching.executor
        self.launch, executor.launch = executor.launch, self.timed
        self.rng, self.told = torch.Generator().manual_seed(1), list[list[float]]()
        self.sessions: dict[str, list[int]] = {}  # the tokens of a session's turns so far
        self.capacity = self.batching.scheduler.capacity
        while self.left or self.batching.sequences:
            if not self.batching.sequences:
                self.move_to(self.left[0].at)
            self.batching.step()
        assert [len(times) for times in self.told] == [a.output for a in load]
        self.preemptions = self.batching.scheduler.memory.counts.preemptions

    @property
    def times(self) -> list[tuple[float, float]]:
        """Of each request's first and last token."""
        return [(times[0], times[-1]) for times in self.told]

    def _told(self, times: list[float], output: Output) -> None:
        times.append(self.clock.now)

    def timed(self, plan: Plan, inputs: StepInputs) -> InFlightStep:
        chunks, held = [(first, n) for _, first, n in plan.prefill], sum(r.held for r in plan.decode)
        seconds = TIMES.mixed(chunks, len(plan.decode), held) if chunks else TIMES.plain(len(plan.decode), held)
        step = self.launch(plan, inputs)
        self.device = end = max(self.device, self.clock.now) + seconds
        tokens = step.tokens

        def wait() -> list[int]:
            self.move_to(end)
            return tokens()

        step.tokens = wait
        return step

    def move_to(self, time: float) -> None:
        """The clock goes on, and requests arrive meanwhile."""
        while self.left and self.left[0].at <= max(time, self.clock.now):
            a, now = self.left.pop(0), self.clock.now
            before = self.sessions.get(a.session, [])
            prompt = [*before, *torch.randint(1, 128, (a.prompt - len(before),), generator=self.rng).tolist()]
            if a.session:
                self.sessions[a.session] = [*prompt, *[0] * a.output]
            times: list[float] = []
            self.told.append(times)
            self.clock.now = a.at
            params = Params(max_new_tokens=a.output, ignore_eos=True)
            self.batching.submit(prompt, params, partial(self._told, times))
            self.clock.now = now
        self.clock.now = max(time, self.clock.now)


def simulated(load: list[Arrival], capacity: Capacity, overlap: bool, bulk: bool = True) -> Outcome:
    capacity = replace(capacity, row_bytes=0)
    engine = EngineModel(capacity=capacity, times=TIMES, overlap=overlap, pacing=lambda: None, bulk=bulk)
    return Cluster(engine, ClusterPlan(replicas=1)).serve(load)


def drawn(rate: float, requests: int, seed: int = 0, output: int = 40) -> list[Arrival]:
    prompt, new = Lengths(mean=90, sigma=0.8, most=300), Lengths(mean=output, sigma=0.7, most=300)
    return Poisson(rate=rate, requests=requests, prompt=prompt, output=new, seed=seed).draw()


NO_CACHE = Serving(slots=3, prefix_cache_bytes=0, host_cache_bytes=0, token_budget=80)
FEW_PAGES = replace(NO_CACHE, slots=4, kv_tokens=6 * 128)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "serving, rate",
    [(NO_CACHE, 0.8), (NO_CACHE, 20.0), (replace(NO_CACHE, mixed_prefill=16), 4.0), (FEW_PAGES, 50.0)],
    ids=["idle", "full", "mixed_prefill", "preempts"],
)
def test_tokens_come_when_the_real_loop_hands_them_out(serving: Serving, rate: float, overlap: bool) -> None:
    load = drawn(rate, 12, output=130 if serving is FEW_PAGES else 40)
    real = Served(load, serving, overlap)
    outcome = simulated(load, real.capacity, overlap)
    assert [(j.first, j.end) for j in outcome.jobs] == [pytest.approx(times, rel=1e-9) for times in real.times]
    assert outcome.preemptions == real.preemptions and (real.preemptions > 0) == (serving is FEW_PAGES)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_session_starts_from_what_the_prefix_cache_holds_of_it(overlap: bool) -> None:
    turns = Poisson(
        rate=0.4,
        requests=9,
        turns=3,
        think=40.0,
        prompt=Lengths(mean=70, sigma=0.3),
        output=Lengths(mean=12, sigma=0.3),
    ).draw()
    real = Served(turns, Serving(slots=3, host_cache_bytes=0, token_budget=80), overlap)
    assert real.capacity.prefix_rows
    outcome = simulated(turns, real.capacity, overlap)
    assert [(j.first, j.end) for j in outcome.jobs] == [pytest.approx(times, rel=1e-9) for times in real.times]
    assert sum(j.cached for j in outcome.jobs) > 200


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_of_steps_is_those_steps(overlap: bool) -> None:
    rng = random.Random(5)
    for seed in range(6):
        capacity = Capacity(
            slots=rng.choice([2, 5, 8]), pages=rng.choice([14, 30]), window_pages=40, page_size=32, ring_pages=5,
            max_seq_len=448, prefill_chunk=64, token_budget=96, max_waiting=20, wait_timeout=rng.choice([3.0, 60.0]),
        )  # fmt: skip
        load = drawn(rng.choice([0.5, 3.0, 10.0]), 40, seed, output=60)
        load = [a for a in load if a.prompt + a.output <= 400]
        many, single = simulated(load, capacity, overlap), simulated(load, capacity, overlap, bulk=False)
        assert [(j.failed, j.first, j.end) for j in many.jobs] == [
            (j.failed, pytest.approx(j.first, rel=1e-12), pytest.approx(j.end, rel=1e-12)) for j in single.jobs
        ]
        assert many.steps == single.steps and many.preemptions == single.preemptions
        assert many.busy_seconds == pytest.approx(single.busy_seconds, rel=1e-12)
