"""States that are written every few tokens, and tokens that are taken back, change no result.

"Within rounding": no further from the same computation in fp64 than the plain form is, plus 1e-5."""

from functools import cache

import pytest
import torch
from helpers.compare import relative_error
from helpers.streams import Call, Run, Streams

from jet_export.kernels.form import Form
from jet_export.kernels.jet_block import jet_block_ref, jet_block_triton

PREFILL, DECODE, MIXED, VERIFY = Form.PREFILL, Form.DECODE, Form.MIXED, Form.VERIFY

STEPS = [
    Call(DECODE, [1, 0]),  # from nothing, beside a padding row
    Call(DECODE, [1, 1]),
    Call(MIXED, [1, 3]),
    *[Call(DECODE, [1, 1])] * 3,
    Call(PREFILL, [2, 17]),
    *[Call(DECODE, [1, 1])] * 2,
]
DRAFTS = [
    Call(PREFILL, [5, 2]),
    Call(VERIFY, [1, 2], [3, 0]),
    Call(VERIFY, [4, 0]),
    Call(DECODE, [1, 1]),
    Call(VERIFY, [2, 3], [0, 1]),
    Call(MIXED, [1, 6]),
    Call(VERIFY, [2, 1], [2, 3]),
    Call(DECODE, [1, 1]),
]


def plain(plan: list[Call]) -> list[Call]:
    """The same tokens without any that are taken back, those of VERIFY one by one."""
    out = []
    for call in plan:
        if call.form != VERIFY:
            out.append(call)
            continue
        for t in range(max(call.tokens)):
            out.append(Call(DECODE, [int(t < n) for n in call.tokens]))
    return out


@cache
def exact(drafts: bool) -> Run:
    """The plain form in fp64."""
    streams = Streams(jet_block_ref, dtype=torch.float64, state_dtype=torch.float64)
    for x, y in zip(streams.inputs, Streams(jet_block_ref).inputs, strict=True):
        x.copy_(y)  # the same numbers
    return streams.run(plain(DRAFTS if drafts else STEPS))


def errors(run: Run, drafts: bool) -> list[float]:
    want = exact(drafts)
    return [relative_error(getattr(run, x)().double(), getattr(want, x)()) for x in ("outputs", "states")]


@pytest.mark.parametrize(
    "block, interval, rollback",
    [
        *((jet_block_ref, *sizes) for sizes in ((2, 0), (4, 0), (7, 0), (1, 4), (3, 4))),
        *((jet_block_triton, *sizes) for sizes in ((3, 0), (1, 4), (3, 4))),
    ],
)
def test_it_is_the_state_of_every_token_and_without_those_taken_back(device, block, interval, rollback):
    if block is jet_block_ref:
        device = "cpu"
    run = Streams(block, device=device).run(DRAFTS if rollback else STEPS, interval, rollback)
    ours, plainly = (
        errors(run, rollback > 0),
        errors(Streams(jet_block_ref).run(plain(DRAFTS if rollback else STEPS)), rollback > 0),
    )
    assert all(a <= b + 1e-5 for a, b in zip(ours, plainly, strict=True))


def test_the_reference_has_the_same_bits_at_any_interval():
    for plan, rollback in ((STEPS, 0), (DRAFTS, 4)):
        runs = [Streams(jet_block_ref).run(plan, *sizes) for sizes in ((1, 4), (2, 4), (5, 4), (1, rollback))]
        for other in runs[1:]:
            assert torch.equal(runs[0].outputs(), other.outputs()) and torch.equal(runs[0].states(), other.states())


@pytest.mark.blas
@pytest.mark.parametrize("block", [jet_block_ref, jet_block_triton], ids=["ref", "kernel"])
def test_a_fork_in_the_middle_of_a_buffer_goes_on_bit_for_bit(device, block):
    if block is jet_block_ref:
        device = "cpu"
    first, rest = (
        [Call(PREFILL, [3, 2]), *[Call(DECODE, [1, 1])] * 2],
        [Call(VERIFY, [2, 1], [1, 0]), Call(DECODE, [1, 1])],
    )
    whole = Streams(block, device=device).run([*first, *rest], 4, 3)
    run = Streams(block, device=device).run(first, 4, 3)
    fork = [pool.flip(0).contiguous() for pool in run.pools]  # rows 0, 1, ... are now the last ones
    other = Streams(block, device=device)
    other.slots = [len(fork[0]) - 1 - slot for slot in other.slots]
    got = other.run(rest, 4, 3, start=run.context, pools=fork)
    for n, (a, b) in enumerate(zip(run.context, whole.context, strict=True)):
        assert torch.equal(got.out[n, a:b], whole.out[n, a:b])
    assert torch.equal(got.states(), whole.states())
