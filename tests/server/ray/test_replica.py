"""A replica without Ray: what it answers to a call, when it is stuck; and the metrics of several as one."""

import asyncio
from contextlib import aclosing

import pytest
from helpers.clock import Clock
from helpers.serving import async_llm

from jet_export.runtime.params import Params
from jet_export.server.ray import engine
from jet_export.server.ray.call import Call, Outputs, Refusal
from jet_export.server.ray.engine import EngineReplica
from jet_export.server.ray.metrics import STALE, Board, merged


def call(*prompts: list[int], **params) -> Call:
    return Call(number=1, prompts=list(prompts), params=Params(**params), prefixes=())


def test_the_outputs_of_a_call_are_those_of_the_engine() -> None:
    llm = async_llm()
    replica = EngineReplica(lambda: llm)

    async def run(asked: Call) -> list[Outputs | Refusal]:
        async with aclosing(replica.generate(asked)) as parts:
            return [p async for p in parts]

    async def plain(prompts: list[list[int]], params: Params) -> list[int | None]:
        stream, found = llm.submit(prompts, params), []
        while batch := await stream.batch():
            found += [o.token for i, o in batch if i == 0]
        return found

    try:
        parts = asyncio.run(run(call([1, 2, 3], [4], max_new_tokens=9, n=2)))
        outputs = [x for p in parts if isinstance(p, Outputs) for x in p.outputs]
        assert {i: len([o for j, o in outputs if j == i]) for i in range(4)} == {0: 9, 1: 9, 2: 9, 3: 9}
        same = asyncio.run(plain([[1, 2, 3]], Params(max_new_tokens=9)))
        assert [o.token for i, o in outputs if i == 0] == same
        (refused,) = asyncio.run(run(call([1], max_new_tokens=10**6)))
        assert isinstance(refused, Refusal) and not refused.queue_full and "max_seq_len" in refused.message
    finally:
        replica.stop()


def test_closing_the_answer_cancels_the_call() -> None:
    llm = async_llm()
    replica = EngineReplica(lambda: llm)

    async def first() -> None:
        async with aclosing(replica.generate(call([1, 2], max_new_tokens=100))) as parts:
            assert isinstance(await anext(parts), Outputs)

    try:
        asyncio.run(first())
        assert llm.batching.metrics.requests["cancelled"] + llm.batching.metrics.requests["length"] == 1
        assert not llm.batching.sequences
    finally:
        replica.stop()


def test_an_engine_that_takes_no_steps_is_not_well(monkeypatch) -> None:
    llm, clock = async_llm(), Clock()
    replica = EngineReplica(lambda: llm, clock=clock)
    try:
        replica.check_health()
        monkeypatch.setattr(llm.batching, "sequences", {"one": None})
        clock.now = engine.STUCK
        replica.check_health()
        clock.now = 3 * engine.STUCK
        with pytest.raises(RuntimeError, match="no step has ended for"):
            replica.check_health()
        llm.batching.metrics.steps += 1
        replica.check_health()
    finally:
        monkeypatch.undo()
        replica.stop()
    with pytest.raises(RuntimeError, match="has stopped"):
        replica.check_health()


def test_metrics_of_replicas_stand_together_and_the_silent_are_left_out() -> None:
    clock = Clock()
    board = Board(clock)
    text = '# HELP a A.\n# TYPE a counter\na{k="v"} 1\n# HELP b B.\n# TYPE b gauge\nb 2\n'
    board.put("x", text)
    clock.now = STALE
    board.put("y", text.replace("2", "3"))
    assert merged(board.read()) == (
        '# HELP a A.\n# TYPE a counter\na{k="v",replica="x"} 1\na{k="v",replica="y"} 1\n'
        '# HELP b B.\n# TYPE b gauge\nb{replica="x"} 2\nb{replica="y"} 3\n'
    )
    clock.now += 1
    assert set(board.read()) == {"y"} and merged({}) == ""


def test_a_real_engines_metrics_can_be_merged() -> None:
    llm = async_llm()
    text = llm.batching.render_metrics()
    both = merged({"x": text, "y": text}).splitlines()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert len([line for line in both if not line.startswith("#")]) == 2 * len(samples)
    assert len([line for line in both if line.startswith("#")]) == len([x for x in text.splitlines() if x[0] == "#"])
