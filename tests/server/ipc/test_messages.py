"""What goes into a message comes out at the other end, however the bytes are cut."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jet_export.runtime.grammar import Grammar
from jet_export.runtime.params import Logprob, Output, Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.serving_engine import Status
from jet_export.server.ipc.channel import HEADER, MAX_FRAME, Frames
from jet_export.server.ipc.messages import (
    REASONS,
    Cancel,
    Refused,
    Submit,
    decode_outputs,
    decode_status,
    encode_outputs,
    encode_status,
)

ids = st.integers(0, 2**32 - 1)
tokens = st.integers(0, 2**31 - 1)
logprobs = st.builds(
    Logprob,
    st.floats(max_value=0, allow_nan=False),
    st.lists(st.tuples(tokens, st.floats(allow_nan=False)), max_size=3).map(tuple),
)
outputs = st.builds(
    Output,
    st.none() | tokens,
    st.just(""),
    st.none() | logprobs,
    st.sampled_from(REASONS),
    st.lists(logprobs, max_size=3).map(tuple),
)


@given(st.lists(st.tuples(ids, outputs)))
def test_outputs(rows) -> None:
    assert list(decode_outputs(encode_outputs(rows))) == rows


PARAMS = Params(
    7,
    Sampling(temperature=0.3, top_k=5, top_p=0.9, seed=-(2**63), min_p=0.1),
    repetition_penalty=1.2,
    stop=("a", "é"),
    stop_ids=(1, 2),
    ignore_eos=True,
    logprobs=3,
    prompt_logprobs=1,
    presence_penalty=-0.5,
    frequency_penalty=0.5,
    logit_bias=((3, -float("inf")), (4, 1.5)),
    min_tokens=2,
    n=2,
    priority=-3,
    grammar=Grammar.choice(["é", "b"]),
)


@given(ids, st.lists(st.lists(tokens)))
def test_submit(first, prompts) -> None:
    twice = [p for p in prompts for _ in range(PARAMS.n)]
    sent = Submit(first, twice, PARAMS).encode()
    assert Submit.decode(sent) == (first, twice, PARAMS)
    alone = Submit(first, prompts, dataclasses.replace(PARAMS, n=1)).encode()
    assert len(sent) == len(alone)  # a prompt is sent once


def test_every_field_of_params_is_tried() -> None:
    same = {f.name for f in dataclasses.fields(Params) if getattr(PARAMS, f.name) == getattr(Params(), f.name)}
    assert not same


def test_the_other_messages() -> None:
    assert Cancel.decode(Cancel(2**32 - 1, "stop").encode()) == (2**32 - 1, "stop")
    assert Refused.decode(Refused(3, True, "no\nroom é").encode()) == (3, True, "no\nroom é")
    assert decode_status(encode_status(9, Status(True, "a 1\n"))) == (9, (True, "a 1\n"))


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=20))), st.data())
def test_frames_cut_anywhere(frames, data) -> None:
    stream = b"".join(HEADER.pack(len(payload), kind) + payload for kind, payload in frames)
    reader, at = Frames(), 0
    out: list[tuple[int, bytes]] = []
    while at < len(stream):
        end = data.draw(st.integers(at + 1, len(stream)))
        out += reader.feed(stream[at:end])
        at = end
    assert out == frames


def test_a_frame_that_is_too_long_is_refused_before_it_comes() -> None:
    with pytest.raises(ValueError, match="frame of"):
        list(Frames().feed(HEADER.pack(MAX_FRAME + 1, 1)))
