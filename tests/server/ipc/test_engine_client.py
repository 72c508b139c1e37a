"""An engine over a channel answers as the engine in this process does; ends that disappear leave nothing running."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from helpers.serving import async_llm

from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.grammar import Grammar
from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output, Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.serving_engine import ServingEngine
from jet_export.server.ipc.engine_client import EngineClient
from jet_export.server.ipc.engine_server import EngineServer, Link
from jet_export.utils.errors import JetExportError

PROMPT = list(b"hello")


@asynccontextmanager
async def connected(llm: AsyncLLM) -> AsyncIterator[tuple[EngineClient, Link, EngineServer]]:
    """A client of the running engine, and the engine's end."""
    ours, theirs = socket.socketpair()
    server = EngineServer(llm.batching)
    link = server.connect(ours, lambda: None, lambda: None)
    client = EngineClient(theirs, llm.tokenizer, llm.limits, llm.engine.config.vocab_size)
    llm.start()
    try:
        async with client.running():
            yield client, link, server
    finally:
        server.disconnect(link)
        await asyncio.to_thread(llm.stop)


async def read(stream: OutputStream) -> list[tuple[int, Output]]:
    out = []
    while batch := await stream.batch():
        out += batch
    return sorted(out, key=lambda item: item[0])  # stable: by prompt


def by_the_engine(llm: AsyncLLM, prompts: list[list[int]], params: Params) -> list[tuple[int, Output]]:
    """Text and stop strings made in the thread that takes the steps."""
    out: list[tuple[int, Output]] = []
    for i, prompt in enumerate(prompts):
        choice = i % params.n
        llm.batching.submit(
            prompt,
            params,
            lambda output, i=i: out.append((i, output)),  # type: ignore[misc]
            choice=choice,
        )
    while llm.batching.step():
        pass
    return sorted(out, key=lambda item: item[0])


@pytest.fixture(scope="module")
def reference() -> AsyncLLM:
    return async_llm()


@pytest.fixture(scope="module")
def text(reference) -> str:
    return "".join(o.text for _, o in by_the_engine(reference, [PROMPT], Params(20)))


def unused(llm: AsyncLLM) -> bool:
    s = llm.batching.scheduler
    return s.slots.used == s.window_pages.used == len(llm.batching.sequences) == 0


@pytest.mark.parametrize("through", ["this process", "a channel"])
def test_answers_are_the_engines(reference, text, through) -> None:
    plain = Params(20)
    stops = [(text[8:11],), (text[-2:],), (text[3:5] + "no", text[12:14]), ("never",)]
    cases = [
        ([PROMPT], plain),
        ([PROMPT], replace(plain, logprobs=3)),
        ([PROMPT, list(b"other")], replace(plain, logprobs=1, prompt_logprobs=2)),
        ([PROMPT] * 3, replace(plain, sampling=Sampling(temperature=1.3, seed=7), n=3)),
        ([PROMPT], replace(plain, sampling=Sampling(temperature=1.3, top_p=0.9, seed=7), stop_ids=tuple(range(60)))),
        *(([PROMPT], replace(plain, stop=stop)) for stop in stops),
        ([PROMPT, [1], [2, 3, 4]], replace(plain, stop=stops[0])),
        ([PROMPT], replace(plain, grammar=Grammar.choice(["hello", "good day"]), stop=("lox", "dayx"), logprobs=1)),
        ([PROMPT] * 2, replace(plain, grammar=Grammar.regex("[a-z]{20,}"), n=2)),
    ]
    expected = [by_the_engine(reference, *case) for case in cases]
    assert {o.finish_reason for answer in expected for _, o in answer} == {None, "length", "stop"}
    llm = async_llm()

    async def in_process() -> list[list[tuple[int, Output]]]:
        async with llm.running():
            return [await read(llm.submit(*case)) for case in cases]

    async def over_a_channel() -> list[list[tuple[int, Output]]]:
        async with connected(llm) as (client, _, _):
            return [await read(client.submit(*case)) for case in cases]

    assert asyncio.run(in_process() if through == "this process" else over_a_channel()) == expected
    counts, asked = llm.batching.metrics.requests, sum(len(prompts) for prompts, _ in cases)
    assert unused(llm) and counts["cancelled"] == 0 and counts["stop"] + counts["length"] == asked


@pytest.mark.parametrize("through", ["this process", "a channel"])
def test_what_the_prefix_cache_had_is_told(through) -> None:
    llm = async_llm(prefix_cache_bytes=1 << 26)
    prompt = [i % 128 for i in range(300)]

    async def cached(engine: ServingEngine) -> list[int]:
        counts = []
        for prompts in ([prompt], [prompt, [1]], [[2]]):
            stream = engine.submit(prompts, Params(2))
            await read(stream)
            counts.append(stream.cached_tokens)
        return counts

    async def in_process() -> list[int]:
        async with llm.running():
            return await cached(llm)

    async def over_a_channel() -> list[int]:
        async with connected(llm) as (client, _, _):
            return await cached(client)

    first, again, other = asyncio.run(in_process() if through == "this process" else over_a_channel())
    assert first == other == 0 and 200 < again < 300


def test_refusals_are_the_engines() -> None:
    llm = async_llm(slots=1, max_waiting=1)

    async def main() -> None:
        async with connected(llm) as (client, _, _):
            for prompts, params in (([[128]], Params(1)), ([[1]], Params(1, stop_ids=(-1,)))):
                with pytest.raises(JetExportError, match="not in the vocabulary of 128"):
                    client.submit(prompts, params)
            with pytest.raises(JetExportError, match="exceed max_seq_len 400"):
                await client.submit([[1], [1] * 400], Params(1)).batch()  # none of the two runs
            stream = client.submit([[1]], Params(390))
            assert await stream.batch()
            with pytest.raises(QueueFull, match="1 requests are waiting"):
                await client.submit([[1], [2]], Params(5)).batch()
            stream.close()
            assert len(await read(client.submit([[1]], Params(3)))) == 3
            status = await client.status()
            assert status.alive and "jet_requests_total" in status.metrics

    asyncio.run(main())
    assert unused(llm)


@pytest.mark.parametrize("through", ["this process", "a channel"])
def test_nobody_waits_for_a_grammar_but_its_request(through, monkeypatch) -> None:
    """While one is compiled, others are answered; what is closed meanwhile does not run."""
    llm, go = async_llm(), threading.Event()
    compiler = llm.batching.grammars
    compile_it = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda grammar: go.wait(60) and compile_it(grammar))
    slow = [Params(5, grammar=Grammar.regex(f"{c}+")) for c in "abc"]

    async def check(engine: ServingEngine) -> None:
        waiting = [engine.submit([PROMPT, [1]], params) for params in slow]
        bad = engine.submit([PROMPT], Params(5, grammar=Grammar.regex("(")))
        assert len(await read(engine.submit([PROMPT], Params(4)))) == 4
        waiting[0].close()
        assert await waiting[0].batch() == []
        await engine.status()  # the engine knows of it
        go.set()
        for stream, c in zip(waiting[1:], "bc", strict=True):
            assert [o.text for _, o in await read(stream)] == [c] * 10
        with pytest.raises(JetExportError, match="unclosed group"):
            await bad.batch()
        await until(lambda: unused(llm))
        assert llm.batching.metrics.requests["length"] == 5 and not compiler._compiling

    async def main() -> None:
        if through == "this process":
            async with llm.running():
                await check(llm)
        else:
            async with connected(llm) as (client, link, _):
                await check(client)
                assert not link._compiling

    asyncio.run(main())


def test_a_front_end_that_goes_while_its_grammar_is_compiled_leaves_nothing(monkeypatch) -> None:
    llm, go = async_llm(), threading.Event()
    compile_it = llm.batching.grammars._compile
    monkeypatch.setattr(llm.batching.grammars, "_compile", lambda grammar: go.wait(60) and compile_it(grammar))

    async def main() -> None:
        async with connected(llm) as (client, link, server):
            client.submit([PROMPT], Params(5, grammar=Grammar.regex("a+")))
            await client.status()
            server.disconnect(link)
            go.set()
            await until(lambda: not llm.batching.grammars._compiling)
            await asyncio.sleep(0)
            assert unused(llm) and not llm.batching.metrics.requests

    asyncio.run(main())


async def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def test_what_is_closed_or_whose_front_end_is_gone_is_cancelled() -> None:
    llm = async_llm()

    async def main() -> None:
        async with connected(llm) as (client, _, _):
            counts = llm.batching.metrics.requests
            stream = client.submit([PROMPT, [1]], Params(390))
            assert await stream.batch()
            stream.close()
            assert await stream.batch() == []
            await until(lambda: counts["cancelled"] == 2)
            stream = client.submit([PROMPT], Params(390))
            assert await stream.batch()
            client._channel.close()
            await until(lambda: counts["cancelled"] == 3)
            assert unused(llm)

    asyncio.run(main())


def test_without_the_engine_every_request_ends_with_an_error() -> None:
    llm = async_llm()

    async def main() -> None:
        async with connected(llm) as (client, link, server):
            lost = asyncio.Event()
            client.on_lost = lost.set
            stream = client.submit([PROMPT, [1]], Params(390))
            assert await stream.batch()
            server.disconnect(link)
            rest = await read(stream)
            assert [o.finish_reason for _, o in rest if o.finish_reason] == ["error", "error"] and lost.is_set()
            assert await read(client.submit([[1]], Params(1))) == [(0, Output(None, finish_reason="error"))]
            assert await client.status() == (False, "")

    asyncio.run(main())
    assert unused(llm)
