"""A GPU that computes nothing and takes stated times: what the runtime makes of launches, graphs and waiting.

Work is queued and ends in order; the host goes on until it reads a result. Captured calls are replayed, and every call
of the engine outside a graph is counted. Sampled tokens are all 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from helpers.clock import Clock
from helpers.eager_bundle import eager_engine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import state_specs
from jet_export.runtime import executor
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.drafts import Proposer
from jet_export.runtime.graphs import GraphCache
from jet_export.runtime.params import Params
from jet_export.runtime.prompt_lookup import Match
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds."""

    plain: Callable[[int], float]  # of a decode call of so many rows
    verify: Callable[[int], float]  # of a verifying call of so many tokens
    prefill: float = 1e-5  # a token of a prompt
    predict: float = 1e-4  # of a call of a multi-token-prediction layer
    capture: float = 0.1  # of a graph, on the host
    look: float = 0.0  # on the host, for a sequence's draft
    output: float = 0.0  # on the host, for a token


@dataclass
class SimulatedGpu:
    """`calls`: of the engine, by kind and whether they were replayed."""

    times: Times
    clock: Clock = field(default_factory=Clock)
    free_at: float = 0.0
    mode: str = "direct"  # of the engine's calls: "direct", "capture" or "replay"
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    def run(self, kind: str, seconds: float) -> None:
        self.calls[kind, self.mode] += 1
        if self.mode != "capture":
            self.free_at = max(self.free_at, self.clock.now) + seconds

    def reading(self, values: Tensor) -> Callable[[], Tensor]:
        ready = self.free_at

        def wait() -> Tensor:
            self.clock.now = max(self.clock.now, ready)
            return values

        return wait

    def capture(self, cache: GraphCache, call: Callable[[], Tensor], overlap: bool = False) -> tuple[Graph, Tensor]:
        cache.captures += 1
        self.clock.now = max(self.clock.now, self.free_at) + self.times.capture
        self.mode = "capture"
        result = call()
        self.mode = "direct"
        return Graph(self, call, result), result


@dataclass
class Graph:
    gpu: SimulatedGpu
    call: Callable[[], Tensor]
    result: Tensor

    def replay(self) -> None:
        self.gpu.mode = "replay"
        self.result.copy_(self.call())
        self.gpu.mode = "direct"


@dataclass
class Timed:
    """A proposer whose looks take the host's time."""

    proposer: Proposer
    gpu: SimulatedGpu

    def __post_init__(self) -> None:
        self.guesses = self.proposer.guesses

    def forget(self, sequence: RunningSequence) -> None:
        self.proposer.forget(sequence)

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        self.gpu.clock.now += self.gpu.times.look
        return self.proposer.offer(sequence, most)

    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw) -> list[list[int]]:
        return self.proposer.draft(sequences, offers, draw)


class Ones:
    """A sampler."""

    def __init__(self, real) -> None:
        self.begin, self.last_tokens = real.begin, real.last_tokens

    def sample(self, logits: Tensor, slots: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.ones(len(logits), dtype=torch.int64), torch.zeros(len(logits))

    def look_ahead(self, logits: Tensor, *rows: object) -> tuple[Tensor, Tensor]:
        return self.sample(logits, torch.empty(0))

    def advance(self, made: dict[int, list[int]]) -> None:
        pass


def simulate(
    monkeypatch: pytest.MonkeyPatch,
    times: Times,
    rows: int,
    proposer: Proposer | None = None,
    *,
    drafts: int = 4,
    fixed: bool = False,
    overlap: bool = True,
    speculate: str = "off",
) -> tuple[BatchingEngine, SimulatedGpu]:
    """An engine of `rows` sequences on such a GPU. The graphs of calls for drafts are not captured yet."""
    gpu = SimulatedGpu(times)
    engine = eager_engine(Limits(max_batch_size=rows, max_seq_len=1024, prefill_chunk=64))
    vocab, engine.rollback, engine.mtp = engine.config.vocab_size, drafts + 1, speculate == "mtp"
    engine.specs = state_specs(engine.config, engine.dtype, hidden=engine.mtp)

    def decode(ids: Tensor, batch, states) -> Tensor:
        gpu.run("decode", times.plain(len(ids)))
        return torch.zeros(len(ids), vocab)

    def verify(ids: Tensor, batch, states) -> Tensor:
        gpu.run("verify", times.verify(len(ids)))
        return torch.zeros(len(ids), vocab)

    def prefill(ids: Tensor, batch, outputs: Tensor, states) -> Tensor:
        gpu.run("prefill", times.prefill * len(ids))
        return torch.zeros(len(outputs), vocab)

    def predict(ids: Tensor, hidden: Tensor, batch, outputs: Tensor | None, kv_cache) -> tuple[Tensor, Tensor]:
        gpu.run("predict", times.predict)
        n = len(ids if outputs is None else outputs)
        return torch.zeros(n, vocab), torch.zeros(n, engine.config.hidden_size)

    for name, call in (("decode", decode), ("verify", verify), ("prefill", prefill), ("predict", predict)):
        setattr(engine, name, call)
    monkeypatch.setattr(GraphCache, "capture", lambda cache, call, overlap=False: gpu.capture(cache, call, overlap))
    monkeypatch.setattr(executor, "copy_to_host", gpu.reading)
    timed = None if proposer is None else Timed(proposer, gpu)
    serving = Serving(prefix_cache_bytes=0, speculate=speculate)
    made = BatchingEngine(
        engine, ByteTokenizer(), -1, serving, overlap=overlap, clock=gpu.clock, proposer=timed, cuda_graphs=True
    )
    made.runner.cuda_graphs = True
    made.runner.capture_calls(made.scheduler.capacity.token_budget, made.scheduler.prompt_tokens)
    made.executor.sampler = Ones(made.executor.sampler)  # type: ignore[assignment]
    if made.speculation:
        made.speculation.lengths.fixed = fixed
    return made, gpu


def ask(made: BatchingEngine, gpu: SimulatedGpu, new: int) -> list[RunningSequence]:
    """A request for each slot."""

    def heard(_) -> None:
        gpu.clock.now += gpu.times.output

    slots = range(made.scheduler.capacity.slots)
    return [made.submit([3] * 8, Params(new, Sampling(seed=i), ignore_eos=True), heard, text=False) for i in slots]


def decode_speed(made: BatchingEngine, gpu: SimulatedGpu, new: int) -> float:
    """Tokens a second from the step behind the last prompt to the one in which the first request ends."""
    answers = ask(made, gpu, new)
    while any(not s.tokens for s in answers):
        made.step()
    begin, before = gpu.clock.now, sum(len(s.tokens) for s in answers)
    while all(s.finish_reason is None for s in answers):
        made.step()
    seconds, tokens = gpu.clock.now - begin, sum(len(s.tokens) for s in answers) - before
    while made.step():
        pass
    return tokens / seconds
