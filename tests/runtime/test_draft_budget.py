"""What drafts may lose: a share of plain decoding's time, whatever steps cost and whatever is accepted."""

import random

import numpy as np
import pytest

from jet_export.runtime.draft_budget import FIRST, MOST, SHARE, START, WORST, DraftBudget
from jet_export.runtime.draft_length import LOOKED, Candidate, DraftLengths
from jet_export.runtime.replay import hashed


@pytest.mark.parametrize("cost", [1.5, 3.0, 10.0])
def test_steps_with_drafts_that_are_all_wrong_cost_the_share_the_start_and_a_step(cost: float) -> None:
    """Of anybody who drafts whenever he may: in n plain steps' time at most START + SHARE n and one step."""
    budget, lost = DraftBudget(), 0.0
    for n in range(1, 3001):
        if budget.is_open:
            budget.drafted_step(cost - 1, first=False)
            lost += cost - 1
        else:
            budget.plain_step()
        assert lost <= START + SHARE * n + cost - 1
    assert lost > SHARE * 2000  # it is used


def test_what_was_gained_may_be_lost_again_and_no_more_than_most() -> None:
    budget = DraftBudget()
    for _ in range(1000):
        budget.drafted_step(-2.0, first=False)
    steps = 0
    while budget.is_open:
        budget.drafted_step(2.0, first=False)
        steps += 1
    assert steps == MOST / 2


def test_the_first_step_of_a_size_and_an_outlier_count_for_a_little() -> None:
    budget = DraftBudget()
    budget.drafted_step(1e6, first=True)
    assert budget.left == START - FIRST and budget.is_open
    budget.drafted_step(1e6, first=False)
    assert budget.left == START - FIRST - WORST
    for _ in range(10):
        budget.drafted_step(1e6, first=False)
    assert budget.left == -WORST


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("steps", [256, 2000])
def test_hopeless_drafts_that_look_good_cost_under_three_percent(rows: int, steps: int) -> None:
    """A verifying step takes 3 plain ones, every draft is wrong, and the estimate of their rate never learns it."""
    lengths, spent, tries = DraftLengths(), 0.0, 0
    for _ in range(steps):
        drafted = sum(lengths.choose([Candidate(4, 0.95)] * rows, rows))
        tries += drafted > 0
        seconds = 3e-3 if drafted else 1e-3
        spent += seconds
        lengths.observe(rows, drafted, seconds)
    extra = spent / (1e-3 * steps) - 1
    assert tries > 1 and extra <= SHARE + (START + 2.0) / steps
    assert extra < 0.03 or steps < 500


def test_accepted_tokens_count_against_what_a_step_costs() -> None:
    lengths = DraftLengths()
    for _ in range(3):
        lengths.observe(4, 0, 1.0)
    lengths.budget.left = 1.0
    lengths.observe(4, 16, 3.0, accepted=12)  # 16 tokens in 3 plain steps' time, which make 12
    assert lengths.budget.left == pytest.approx(2.0)
    for _ in range(2):
        lengths.observe(4, 0, 2.0, prompt_tokens=100)
    left = lengths.budget.left
    lengths.observe(4, 4, 3.0, prompt_tokens=100, accepted=4)  # 8 tokens in 1.5 steps beside prompts, which make 6
    assert lengths.budget.left == pytest.approx(left + 0.5)


def test_replayed_drafts_are_right_with_the_stated_probability_at_every_token() -> None:
    """And independently: both of two neighbours with its square."""
    rng = random.Random(0)
    for p in (0.3, 0.8):
        right = np.concatenate([hashed(rng.randrange(2**31), 40, 4) < p * 2**64 for _ in range(100)])
        assert right.shape == (4000, 4)
        assert right.mean(0) == pytest.approx([p] * 4, abs=0.03)
        assert (right[:, 0] & right[:, 1]).mean() == pytest.approx(p * p, abs=0.03)
        assert (right[:-1, 0] & right[1:, 0]).mean() == pytest.approx(p * p, abs=0.03)


def test_looks_that_plain_steps_wait_for_are_paid_and_cost_under_three_percent() -> None:
    """A look takes half a plain step, and no draft is ever found."""
    lengths, rng, spent, looks = DraftLengths(), random.Random(0), 0.0, 0
    for _ in range(2000):
        looked = 0.5e-3 if lengths.may_look(8) and lengths.could_pay(8, 4) else 0.0
        looks += looked > 0
        seconds = (1e-3 + looked) * rng.uniform(0.95, 1.05)
        spent += seconds
        lengths.observe(8, 0, seconds, looked=looked)
    assert 40 < looks < 110 and spent < 1.03 * 2.0


def test_looks_that_no_step_waits_for_cost_nothing() -> None:
    """The host looks while the GPU computes: all steps look, but one in LOOKED."""
    lengths, rng, looks = DraftLengths(), random.Random(0), 0
    for _ in range(1700):
        looked = 0.3e-3 if lengths.may_look(8) and lengths.could_pay(8, 4) else 0.0
        looks += looked > 0
        lengths.observe(8, 0, 1e-3 * rng.uniform(0.95, 1.05), looked=looked)
    assert looks == pytest.approx(1700 * LOOKED / (LOOKED + 1), rel=0.02)
