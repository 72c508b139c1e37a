"""How much prompt joins a step that decodes: never none, whole tiles, and within the time per token asked for."""

import pytest

from jet_export.bundle.limits import Limits
from jet_export.runtime.calls import captured_size
from jet_export.runtime.pacing import LEAST, SPARE, TILE, Pacing, usual_prompt_tokens

LIMITS = Limits(max_batch_size=256, max_seq_len=4096, prefill_chunk=2048)


@pytest.mark.parametrize("decoding", [1, 7, 11, 31, 46, 47, 62, 63])
def test_the_usual_step_wastes_no_tile(decoding: int) -> None:
    n = usual_prompt_tokens(decoding)
    assert n >= 512 - SPARE
    size = captured_size(n + decoding, decoding + 1, LIMITS)
    assert size is not None and size.tokens % TILE == 0 and size.tokens - (n + decoding) <= SPARE


def test_more_sequences_may_wait_for_a_longer_prompt() -> None:
    usual = [usual_prompt_tokens(n) + n for n in range(1, 1025)]
    assert usual == sorted(usual)


def step_seconds(decoding: int, prompt: int) -> float:
    return 2e-3 + 25e-6 * decoding + 8e-6 * prompt


@pytest.mark.parametrize("seconds, decoding", [(5e-3, 8), (5e-3, 64), (8e-3, 64), (20e-3, 256)])
def test_a_step_comes_to_take_the_time_asked_for(seconds: float, decoding: int) -> None:
    pacing = Pacing(1e3 * seconds)
    for _ in range(40):
        n = pacing.prompt_tokens(decoding)
        pacing.observe(decoding, n, step_seconds(decoding, n))
        pacing.observe(decoding, 0, step_seconds(decoding, 0))
    taken = step_seconds(decoding, pacing.prompt_tokens(decoding))
    assert 0.98 * seconds < taken < 1.001 * seconds


def test_a_time_that_cannot_be_kept_leaves_prompts_the_least() -> None:
    pacing = Pacing(1.0)
    assert pacing.prompt_tokens(64) == usual_prompt_tokens(64)  # no step has been seen
    pacing.observe(64, 0, step_seconds(64, 0))
    assert pacing.prompt_tokens(64) == LEAST
    pacing.observe(64, LEAST, step_seconds(64, LEAST))
    assert pacing.prompt_tokens(64) == LEAST


def test_without_a_time_what_steps_take_changes_nothing() -> None:
    pacing = Pacing()
    for n in (0, 500):
        pacing.observe(64, n, 1.0)
    assert pacing.prompt_tokens(64) == usual_prompt_tokens(64)
    pacing.observe(0, 2048, 1.0)  # a step of prompts only is nobody's time per token
    assert pacing.plain == {8: 1.0}
