"""The million tokens' script at a few thousand: it passes, and a state that is lost or rounded is noticed."""

import torch
from helpers.scripts import load_script
from torch import Tensor

script = load_script("kernels/million_tokens.py")


def errors(prefill: object) -> list[object]:
    forms = {"steps": script.steps, "prefill": prefill}
    found = list(script.run(forms, "cpu", [256, 768], 256, 0))
    assert [e.tokens for errors in found for e in errors] == [256] * 8 + [768] * 8
    return [e for errors in found for e in errors]


def test_the_op_is_as_near_to_fp64_as_steps_in_fp32() -> None:
    found = errors(script.forms("cpu")["prefill"])
    assert script.worse(found) == []


def test_a_state_that_is_rounded_or_not_carried_is_noticed() -> None:
    def rounded(x: tuple[Tensor, ...], state: Tensor) -> Tensor:
        o = script.chunks(x, state)
        state.copy_(state.bfloat16())
        return o

    def lost(x: tuple[Tensor, ...], state: Tensor) -> Tensor:
        return script.chunks(x, state.zero_())

    assert {e.g for e in script.worse(errors(rounded))} >= set(script.DECAYS[1:])
    assert {e.tokens for e in script.worse(errors(lost))} == {768}


def test_one_token_a_call_is_the_same_as_all_at_once() -> None:
    x, H = script.inputs(0, 65, 0), len(script.DECAYS)
    a, b = torch.zeros(2, 1, H, script.K, script.V)
    one, all_ = script.Op(script.Form.DECODE, 1)(x, a), script.Op(script.Form.PREFILL, 0)(x, b)
    assert max(script.relative(one, all_.double(), (0, 2)) + script.relative(a[0], b[0].double(), (1, 2))) < 1e-5
