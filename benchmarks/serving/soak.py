"""Mixed traffic for hours, and what must hold throughout.

    python benchmarks/serving/soak.py BUNDLE [--minutes 3] [--workers 8] [--new-tokens 200] [--seed 0] [--output FILE]

Greedy and sampled requests, n > 1, grammars, sessions, drafts (where the bundle verifies them), cancellations and bad
requests, in rounds; batch-invariant, with so few KV pages that requests are preempted, and a prefix cache that evicts.
After each round, when nothing runs:

    answers   every answer is bit for bit what the same request gave alone, before the first round
    pools     every slot and page is free, but those of cached prefixes; no number is free twice
    memory    the process, and the GPU, hold no more than after the first quarter of the rounds (+ GROWTH)
    latency   a request that runs alone takes no longer than in the first quarter (by the median, times DRIFT); on a
              CPU, whose other work would be seen too, by the processor time that it takes

The first that fails ends the run with status 1. The last two need a few rounds to mean something, and are not asked of
fewer than ROUNDS.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from jet_export.model.cache import PAGE
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.capacity import Serving
from jet_export.runtime.grammar import Grammar
from jet_export.runtime.params import Params
from jet_export.runtime.pools import Pool
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sessions import Session
from jet_export.utils.environment import write_result
from jet_export.utils.errors import JetExportError

ROUNDS = 12
GROWTH = 64e6  # bytes
DRIFT = 1.5
PROMPTS = 6  # of each kind of request
CACHE = 64 * 2**20  # bytes, on the device and on the host
PATTERN = "[0-9]{3}-[a-f]{2}"
Answer = tuple[tuple[int | None, ...], ...]  # the tokens of each choice


class Broken(Exception):
    """What must hold does not."""


@dataclass(kw_only=True)
class Record:
    """What has happened."""

    requests: dict[str, int] = field(default_factory=dict)  # by kind
    alone_seconds: float = 0.0  # of every request alone, before the first round
    seconds: list[float] = field(default_factory=list)  # since the first round began, after each round
    rss: list[int] = field(default_factory=list)  # bytes, after each round
    gpu: list[int] = field(default_factory=list)
    probe: list[float] = field(default_factory=list)  # seconds of a request alone, after each round
    probe_cpu: list[float] = field(default_factory=list)  # processor time of it; engines on a CPU only


class Soak:
    """Rounds of requests on a started engine; `new`: the tokens of an answer."""

    def __init__(self, llm: AsyncLLM, seed: int, new: int = 200) -> None:
        self.llm, self.rng, self.record = llm, random.Random(seed), Record()
        c = llm.batching.scheduler.capacity
        self.chunk, self.new = c.prefill_chunk, min(new, c.max_seq_len // 5)
        vocab = llm.engine.config.vocab_size
        shared = [self.rng.randrange(vocab) for _ in range(c.max_seq_len)]  # so that prefixes are found again
        self.prompts = []
        for i in range(PROMPTS):  # each ends just before a page does, so that its answer needs another one
            length = page_of(i, c.max_seq_len, c.page_size) * c.page_size - 3 - i
            self.prompts.append(shared[: length - 9 - i] + [self.rng.randrange(vocab) for _ in range(9 + i)])
        self.kinds: dict[str, Callable[[int], Awaitable[Answer]]] = {
            "greedy": lambda i: self.answer(i, self.params()),
            "sampled": lambda i: self.answer(i, self.params(Sampling(temperature=0.9, top_p=0.9, seed=i))),
            "penalised": lambda i: self.answer(
                i, self.params(frequency_penalty=0.5, repetition_penalty=1.1, logprobs=2)
            ),
            "choices": lambda i: self.answer(i, self.params(Sampling(temperature=0.8, seed=7), n=3), copies=3),
            "grammar": self.matched,
            "session": self.continued,
        }
        self.turn: list[str] = []
        self.alone: dict[tuple[str, int], Answer] = {}

    def params(self, sampling: Sampling | None = None, **more: object) -> Params:
        return Params(self.new, sampling or Sampling(), ignore_eos=True, **more)  # type: ignore[arg-type]

    async def answer(
        self,
        i: int,
        params: Params,
        *,
        copies: int = 1,
        prompt: Sequence[int] | None = None,
        session: Session | None = None,
    ) -> Answer:
        """The tokens of each copy of a prompt. Raises Broken where one does not end as it should."""
        prompts = [list(self.prompts[i] if prompt is None else prompt)] * copies
        tokens: list[list[int | None]] = [[] for _ in prompts]
        async for n, output in self.llm.stream(prompts, params, [session] if session else None):
            tokens[n].append(output.token)
            if output.finish_reason not in (None, "length", "stop"):
                raise Broken(f"a request ended with {output.finish_reason}: {self.llm.batching.failure}")
        return tuple(map(tuple, tokens))

    async def matched(self, i: int) -> Answer:
        params, text = Params(16, Sampling(temperature=1.0, seed=i), grammar=Grammar.regex(PATTERN)), ""
        tokens: list[int | None] = []
        async for _, output in self.llm.stream([self.prompts[i]], params):
            text += output.text
            tokens.append(output.token)
        if not re.fullmatch(PATTERN, text):
            raise Broken(f"{text!r} does not match its grammar")
        return (tuple(tokens),)

    async def continued(self, i: int) -> Answer:
        """Two turns of a session, and a fork of it that is thrown away."""
        prompt = self.prompts[i]
        cut = max(1, len(prompt) // self.chunk * self.chunk or len(prompt) // 2)
        session = await self.llm.session(prompt[:cut])
        self.llm.fork(session)
        first = await self.answer(i, self.params(), prompt=prompt[cut:] or prompt[:1], session=session)
        return first + await self.answer(i, self.params(), prompt=prompt[:3], session=session)

    async def cancelled(self, after: int) -> None:
        stream = self.llm.stream([self.rng.choice(self.prompts)] * 2, self.params(n=2))
        async for _ in stream:
            after -= 1
            if after <= 0:
                break
        await stream.aclose()

    async def bad(self) -> None:
        vocab, longest = self.llm.engine.config.vocab_size, self.llm.limits.max_seq_len
        for prompt in ([vocab], [-1], [1] * (longest + 1), []):
            try:
                await self.answer(0, self.params(), prompt=prompt)
            except JetExportError:
                continue
            raise Broken(f"a prompt of {len(prompt)} tokens, {prompt[:1]} first, was not refused")

    async def one(self) -> None:
        """A request of some kind, held against what it gave alone."""
        if not self.turn:  # each kind once, before any comes again
            self.turn = [*self.kinds, "cancelled", "bad"]
            self.rng.shuffle(self.turn)
        kind = self.turn.pop()
        i, after = self.rng.randrange(PROMPTS), self.rng.randrange(2 * self.new)
        self.record.requests[kind] = self.record.requests.get(kind, 0) + 1
        if kind == "cancelled":
            await self.cancelled(after)
        elif kind == "bad":
            await self.bad()
        elif (found := await self.kinds[kind](i)) != self.alone[kind, i]:
            raise Broken(f"{kind} request {i} gives {found}, and alone {self.alone[kind, i]}")

    async def begin(self) -> None:
        """Every request alone."""
        for kind, run in self.kinds.items():
            for i in range(PROMPTS):
                self.alone[kind, i] = await run(i)
        self.check_pools()

    async def round(self, requests: int, workers: int) -> None:
        left = [requests]

        async def work() -> None:
            while left[0] > 0:
                left[0] -= 1
                await self.one()

        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(work())
        await self.quiet()
        self.check_pools()
        began, began_cpu = time.perf_counter(), time.process_time()
        await self.kinds["greedy"](0)
        self.record.probe.append(time.perf_counter() - began)
        self.record.rss.append(resident())
        if self.llm.engine.device.type == "cuda":
            self.record.gpu.append(torch.cuda.memory_allocated())
        else:
            self.record.probe_cpu.append(time.process_time() - began_cpu)
        await self.quiet()

    async def quiet(self) -> None:
        """Until cancelled requests have gone, too."""
        while self.llm.batching.sequences or self.llm.batching.scheduler.slots.used:
            await asyncio.sleep(0.01)

    def check_pools(self) -> None:
        """Raises Broken unless only cached prefixes hold anything."""
        with self.llm.batching.lock:
            memory = self.llm.batching.scheduler.memory
            held = memory.slots.used, memory.window_pages.used, memory.requests_pages
            if any(held):
                raise Broken(f"nothing runs, and slots, window pages, pages {held} are in use")
            for name in ("slots", "pages", "window_pages"):
                check_pool(name, getattr(memory, name))

    def check_drift(self) -> None:
        """Raises Broken where memory grows or answers become slower."""
        for name, values in (("memory", self.record.rss), ("GPU memory", self.record.gpu)):
            if len(values) >= ROUNDS and values[-1] > (first := values[len(values) // 4]) + GROWTH:
                raise Broken(f"{name} has grown from {first / 1e6:,.0f} to {values[-1] / 1e6:,.0f} MB")
        probe = self.record.probe_cpu or self.record.probe
        quarter = len(probe) // 4
        if len(probe) >= ROUNDS:
            before, now = statistics.median(probe[:quarter]), statistics.median(probe[-quarter:])
            if now > DRIFT * before:
                raise Broken(f"a request alone takes {now * 1e3:.0f} ms, and {before * 1e3:.0f} ms at the beginning")


def page_of(i: int, max_seq_len: int, page: int) -> int:
    """The page in which prompt i ends, from 1."""
    return 1 + i % max(1, max_seq_len // page // 2)


def check_pool(name: str, pool: Pool) -> None:
    """Raises Broken unless each number is either free or held, and none is free twice."""
    held = sum(n > 0 for n in pool.holders)
    if held + pool.free != pool.size or len(set(pool._free)) != pool.free or min(pool.holders, default=0) < 0:
        raise Broken(f"{name}: {held} held and {pool.free} free, of {pool.size}")


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def pressed(bundle: Path | str) -> AsyncLLM:
    """With pages for about one and a half sequences of the longest kind, and caches of a few entries: prefixes only
    where the bundle's chunks are short, as --prefill-chunk 128 makes them."""
    from jet_export.bundle.manifest import Manifest

    m = Manifest.load(bundle)
    pages = max(page_of(i, m.limits.max_seq_len, PAGE) for i in range(PROMPTS)) * 3 // 2 + 1
    entries = max(256, m.limits.prefill_chunk) <= m.limits.max_seq_len // 2  # batch-invariant: ends of whole chunks
    serving = Serving(
        slots=min(m.limits.max_batch_size, 16),
        kv_tokens=pages * PAGE,
        deterministic=True,
        speculate="lookup" if m.rollback else "off",
        wait_timeout=1e9,
        prefix_cache_bytes=CACHE if entries else None,
        host_cache_bytes=CACHE,
    )
    return AsyncLLM(bundle, serving)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Rounds for so many seconds, one at least, and at most `rounds`."""

    seconds: float
    requests: int = 64  # of a round
    workers: int = 8  # requests at once
    rounds: int = 10**9


async def run(soak: Soak, length: Length, log: Callable[[str], None]) -> None:
    """Raises Broken."""
    async with soak.llm.running():
        began = time.monotonic()
        await soak.begin()
        soak.record.alone_seconds = time.monotonic() - began
        log(f"{len(soak.alone)} requests alone: {soak.record.alone_seconds:.0f} s")
        began, rounds = time.monotonic(), 0
        while rounds < length.rounds and (not rounds or time.monotonic() < began + length.seconds):
            try:
                await soak.round(length.requests, length.workers)
            except* Broken as group:
                raise Broken(str(group.exceptions[0])) from None
            rounds += 1
            soak.record.seconds.append(time.monotonic() - began)
            soak.check_drift()
            counts = soak.llm.batching.scheduler.memory.counts
            log(
                f"round {rounds}: {sum(soak.record.requests.values())} requests, {counts.preemptions} preemptions, "
                f"{counts.hits} prefix hits, {counts.evictions} evictions, {soak.record.rss[-1] / 1e6:.0f} MB, "
                f"alone {soak.record.probe[-1] * 1e3:.0f} ms"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=8, help="requests at once")
    parser.add_argument("--new-tokens", type=int, default=200, help="of an answer; many pages: more preemptions")
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON: the counts, and every round's memory and latency")
    args = parser.parse_args()
    soak = Soak(pressed(args.bundle), args.seed, args.new_tokens)
    length = Length(seconds=60 * args.minutes, requests=args.requests, workers=args.workers)

    def report(line: str, broken: str | None = None) -> None:
        """After each round, so that a run that is killed has its result."""
        print(line, flush=True)
        if args.output:
            counts = asdict(soak.llm.batching.scheduler.memory.counts)
            write_result(args.output, {"broken": broken, "memory": counts, **asdict(soak.record)})

    broken = None
    try:
        asyncio.run(run(soak, length, report))
    except Broken as e:
        broken = str(e)
        report(f"broken: {broken}", broken)
    if not broken:
        print(f"all held: {dict(soak.record.requests)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
