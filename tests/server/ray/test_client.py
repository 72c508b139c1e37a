"""Calls to a fleet, without Ray: outputs, retries, refusals, and that closing a stream ends its call."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from jet_export.model.cache import PAGE
from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output, Params
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.serving_engine import RequestLimits, Status
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.server.ray import client
from jet_export.server.ray.call import Call, Outputs, Refusal
from jet_export.server.ray.client import FleetEngine, Overloaded, ReplicaLost
from jet_export.utils.errors import JetExportError

Part = Outputs | Refusal | Exception


class Scripted:
    """Answers with the parts; an exception is raised where it stands; then waits if `waits`."""

    def __init__(self, *parts: Part, waits: bool = False) -> None:
        self.parts, self.waits, self.cancelled = parts, waits, False

    async def __aiter__(self) -> AsyncIterator[Outputs | Refusal]:
        for part in self.parts:
            await asyncio.sleep(0)
            if isinstance(part, Exception):
                raise part
            yield part
        if self.waits:
            await asyncio.Event().wait()

    def cancel(self) -> None:
        self.cancelled = True


def part(i: int, token: int | None, reason: str | None = None) -> Outputs:
    return Outputs(outputs=[(i, Output(token, "x", finish_reason=reason))], cached=[5, 7])


def fleet(*answers: Scripted) -> tuple[FleetEngine, list[Call]]:
    sent: list[Call] = []

    def send(call: Call) -> Scripted:
        sent.append(call)
        return answers[len(sent) - 1]

    async def status() -> Status:
        return Status(True, "")

    return FleetEngine(send, ByteTokenizer(), RequestLimits(4, 4, 4096), 256, status), sent


def ask(engine: FleetEngine, prompts: list[list[int]] | None = None, params: Params | None = None):
    """Everything that comes back."""

    async def run() -> tuple[list[tuple[int, int | None, str | None]], OutputStream]:
        stream = engine.submit(prompts or [[1, 2]], params or Params())
        found = []
        while batch := await stream.batch():
            found += [(i, o.token, o.finish_reason) for i, o in batch]
        return found, stream

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.0)


def test_outputs_of_several_prompts_come_with_their_index() -> None:
    engine, sent = fleet(Scripted(part(1, 8), part(0, 9, "stop"), part(1, 7, "length")))
    prompt = list(range(200))
    found, stream = ask(engine, [prompt, prompt], Params(n=2))
    assert found == [(1, 8, None), (0, 9, "stop"), (1, 7, "length")] and stream.cached_tokens == 12
    (call,) = sent
    assert call.prompts == [prompt] and len(call.prefixes) == 200 // PAGE  # once for its two answers


def test_what_has_sent_nothing_goes_to_another_replica() -> None:
    lost = [Scripted(ReplicaLost("died")) for _ in range(client.TRIES - 1)]
    engine, sent = fleet(*lost, Scripted(part(0, 3, "stop")))
    assert ask(engine)[0] == [(0, 3, "stop")] and len(sent) == client.TRIES and sent[0] is sent[-1]


def test_what_has_sent_something_ends_with_an_error() -> None:
    engine, sent = fleet(Scripted(part(0, 3), part(1, 4, "stop"), ReplicaLost("died")))
    assert ask(engine, [[1], [2]])[0] == [(0, 3, None), (1, 4, "stop"), (0, None, "error")] and len(sent) == 1


@pytest.mark.parametrize("e", [ReplicaLost("died"), RuntimeError("in the engine")])
def test_without_end_it_ends_with_an_error(e: Exception) -> None:
    engine, sent = fleet(*[Scripted(e) for _ in range(client.TRIES)])
    assert ask(engine)[0] == [(0, None, "error")]
    assert len(sent) == (client.TRIES if isinstance(e, ReplicaLost) else 1)


@pytest.mark.parametrize(
    "answer, error",
    [
        (Refusal(message="full", queue_full=True), QueueFull),
        (Refusal(message="too long", queue_full=False), JetExportError),
        (Overloaded(), QueueFull),
    ],
)
def test_refusals_are_the_engines(answer: Part, error: type[Exception]) -> None:
    engine, _ = fleet(Scripted(answer))
    with pytest.raises(error) as raised:
        ask(engine)
    assert type(raised.value) is error
    with pytest.raises(JetExportError, match="token 999 is not in the vocabulary"):
        ask(engine, [[999]])


def test_a_closed_stream_ends_its_call() -> None:
    answer = Scripted(part(0, 3), waits=True)
    engine, _ = fleet(answer)

    async def run() -> None:
        stream = engine.submit([[1], [2]], Params())
        await stream.batch()
        stream.close()
        while engine._tasks:
            await asyncio.sleep(0)

    asyncio.run(run())
    assert answer.cancelled
