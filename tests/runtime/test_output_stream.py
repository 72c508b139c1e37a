"""OutputStream: text made where it is read is the text that the engine would have made, token for token."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output, Params
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer, StopText

EOS = 0


class Utf8(ByteTokenizer):
    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def engine_outputs(tokens: list[int], params: Params, text: StopText | None) -> list[Output]:
    """What the engine delivers for these tokens."""
    sequence = RunningSequence(request=None, prompt=[1], params=params, text=text, on_output=lambda _: None)  # type: ignore[arg-type]
    outputs: list[Output] = []
    for token in tokens:
        made, reason = sequence.append(token, (EOS,))
        outputs.append(Output(token, made, None, reason))
        if reason:
            break
    return outputs


async def read(stream: OutputStream, *parts: list[Output]) -> list[Output]:
    """The outputs of one prompt's stream that is given these parts, each at once."""
    out = []
    for part in parts:
        for output in part:
            stream.put(0, output)
        if part:
            out += await stream.batch()
    return [output for _, output in out]


stops = st.lists(st.text("abé<", min_size=1, max_size=3), max_size=3)


@given(st.text("abé<", max_size=10), stops, st.integers(1, 12), st.booleans(), st.integers(0, 12))
def test_text_is_what_the_engine_would_have_made(text, stop, limit, stop_token, cut) -> None:
    tokens = [*text.encode(), *([EOS] if stop_token else []), *b"aaaaaaaaaaaa"]
    expected = engine_outputs(tokens, Params(limit, stop=tuple(stop)), StopText(Utf8(), stop))
    arriving = engine_outputs(tokens, Params(limit), None)
    cancelled: list[tuple[int, str]] = []
    stream = OutputStream(1, lambda i, reason: cancelled.append((i, reason)), [StopText(Utf8(), stop)])
    assert asyncio.run(read(stream, arriving[:cut], arriving[cut:])) == expected
    ended_early = len(expected) < len(arriving)
    assert cancelled == ([(0, "stop")] if ended_early else [])  # the engine did not know


def test_the_outputs_of_a_prompt_that_ended_are_dropped() -> None:
    async def main() -> None:
        stream = OutputStream(2, lambda *_: None, [StopText(Utf8(), ("b",))] * 2)
        for token in b"abc":
            stream.put(0, Output(token))
        stream.put(0, Output(None, finish_reason="cancelled"))
        assert await stream.batch() == [(0, Output(97, "a")), (0, Output(98, "", None, "stop"))]
        stream.put(1, Output(None, finish_reason="timeout"))
        assert await stream.batch() == [(1, Output(None, finish_reason="timeout"))]
        assert await stream.batch() == []

    asyncio.run(main())


def test_close_ends_a_reader_that_waits_and_cancels_what_runs() -> None:
    async def main() -> None:
        cancelled = []
        stream = OutputStream(3, lambda i, reason: cancelled.append((i, reason)), None)
        stream.put(1, Output(5, "x", None, "length"))
        assert await stream.batch() == [(1, Output(5, "x", None, "length"))]
        reader = asyncio.ensure_future(stream.batch())
        await asyncio.sleep(0)
        stream.close()
        assert await reader == [] and cancelled == [(0, "cancelled"), (2, "cancelled")]

    asyncio.run(main())
