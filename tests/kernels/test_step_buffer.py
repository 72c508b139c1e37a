"""States that are written every few tokens, and tokens that are taken back, change no result.

"Within rounding": no further from the same computation in fp64 than the plain form is, plus 1e-5."""

import pytest
import torch
from helpers.compare import relative_error
from helpers.streams import Call, Run, Streams

from jet_export.kernels.form import Form
from jet_export.kernels.jet_block import jet_block_ref, jet_block_triton

PREFILL, DECODE, MIXED, VERIFY = Form.PREFILL, Form.DECODE, Form.MIXED, Form.VERIFY
BLOCKS = pytest.mark.parametrize("block", [jet_block_ref, jet_block_triton], ids=["ref", "kernel"])

STEPS = [
    Call(DECODE, [1, 1, 0]),  # from nothing, with a padding row
    Call(DECODE, [1, 1, 1]),
    Call(MIXED, [1, 3, 0]),
    *[Call(DECODE, [1, 1, 1])] * 3,
    Call(PREFILL, [2, 1, 18]),
    *[Call(DECODE, [1, 0, 1])] * 5,
]
DRAFTS = [
    Call(PREFILL, [5, 2, 3]),
    Call(VERIFY, [1, 2, 1], [3, 0, 2]),
    Call(VERIFY, [4, 1, 0], [0, 0, 0]),
    Call(DECODE, [1, 1, 1]),
    Call(VERIFY, [1, 3, 2], [0, 1, 1]),
    Call(MIXED, [1, 6, 1]),
    Call(VERIFY, [2, 1, 4], [2, 3, 0]),
    Call(DECODE, [1, 1, 1]),
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


def check(got: Run, plan: list[Call], block=jet_block_ref, **sizes) -> None:
    exact = Streams(jet_block_ref, dtype=torch.float64, state_dtype=torch.float64, **sizes)
    for x, y in zip(exact.inputs, got.streams.inputs, strict=True):
        x.copy_(y)  # the same numbers
    want = exact.run(plain(plan))
    same = Streams(block, **sizes, device=got.streams.device).run(plain(plan))
    for name in ("outputs", "states"):
        g, w, s = (getattr(r, name)().double() for r in (got, want, same))
        assert relative_error(g, w) <= relative_error(s, w) + 1e-5, name


@BLOCKS
@pytest.mark.parametrize("interval", [2, 4, 7])
def test_a_state_written_every_few_tokens_is_that_of_every_token(device, block, interval):
    if block is jet_block_ref and str(device) != "cpu":
        pytest.skip("the references run on a CPU")
    check(Streams(block, device=device).run(STEPS, interval), STEPS, block)


@BLOCKS
@pytest.mark.parametrize("interval", [1, 3])
def test_tokens_taken_back_leave_no_trace(device, block, interval):
    if block is jet_block_ref and str(device) != "cpu":
        pytest.skip("the references run on a CPU")
    check(Streams(block, device=device).run(DRAFTS, interval, rollback=4), DRAFTS, block)


def test_the_reference_has_the_same_bits_at_any_interval():
    for plan, rollback in ((STEPS, 0), (DRAFTS, 4)):
        runs = [Streams(jet_block_ref).run(plan, interval, 4) for interval in (1, 2, 5)]
        runs += [Streams(jet_block_ref).run(plan, interval, rollback) for interval in (1, 5)]
        first = runs[0]
        for other in runs[1:]:
            assert torch.equal(first.outputs(), other.outputs()) and torch.equal(first.states(), other.states())
