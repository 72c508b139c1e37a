"""Speculation is never much slower than plain decoding: on a simulated GPU, whose steps take stated times."""

from dataclasses import replace

import pytest
from helpers.simulated_gpu import Times, ask, decode_speed, simulate

from jet_export.runtime.params import Params
from jet_export.runtime.replay import ReplayProposer
from jet_export.runtime.sequence import RunningSequence

# A small model on a large GPU: a step of few tokens is weights and launches. What verification takes varies with where
# it is as dear as the tokens that it computes.
CHEAP = Times(
    plain=lambda rows: 1.3e-3 + 2.7e-5 * rows,
    verify=lambda tokens: 1.9e-3 + 1.2e-5 * tokens,
    look=1e-5,
    output=8e-6,
    capture=0.05,
)
DEAR = replace(CHEAP, verify=lambda tokens: 1.9e-3 + 2.7e-5 * tokens)
SLOW_LOOKS = replace(DEAR, look=1e-4)
NEW = 180


def recorded(monkeypatch, times: Times, rows: int) -> tuple[list[RunningSequence], float]:
    """Answers without drafts, and tokens a second."""
    made, gpu = simulate(monkeypatch, times, rows)
    answers = ask(made, gpu, NEW)
    while made.step():
        pass
    return answers, decode_speed(made, gpu, NEW)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("times", [CHEAP, DEAR, SLOW_LOOKS], ids=["cheap", "dear", "slow looks"])
def test_it_is_never_much_slower_than_plain_and_nearly_as_fast_as_whole_drafts(monkeypatch, times: Times, rows) -> None:
    """From the first request on: graphs that are captured in a step say nothing of what a step of its size takes, and
    looks that plain steps wait for are paid from the budget."""
    answers, plain = recorded(monkeypatch, times, rows)
    for acceptance in (0.0, 0.9):
        speeds = []
        for fixed in (False, True) if acceptance else (False,):
            proposer = ReplayProposer(answers, acceptance, 128)
            made, gpu = simulate(monkeypatch, times, rows, proposer, fixed=fixed)
            decode_speed(made, gpu, NEW)
            speeds.append(decode_speed(made, gpu, NEW))
        assert speeds[0] > 0.97 * plain
        assert speeds[0] > 0.9 * max(speeds)


def test_a_prepared_engine_decodes_and_verifies_by_graphs_alone(monkeypatch) -> None:
    """Whatever is drafted for whom, and however many sequences are left."""
    answers, _ = recorded(monkeypatch, CHEAP, 6)
    made, gpu = simulate(monkeypatch, CHEAP, 6, ReplayProposer(answers, 0.6, 128), fixed=True)
    made.prepare()
    gpu.calls.clear()
    ask(made, gpu, NEW)
    while made.step():
        pass
    assert gpu.calls["verify", "replay"] > 40
    assert not [kind for kind, mode in gpu.calls if mode == "capture" or (mode == "direct" and kind != "prefill")]
    drafted = made.metrics.drafts
    assert drafted is not None and 0 < sum(drafted.accepted) < sum(drafted.drafted)


def test_a_step_with_prompts_and_drafts_is_two_graphs(monkeypatch) -> None:
    """Prompts join while others have drafts, which go on meanwhile."""
    answers, _ = recorded(monkeypatch, CHEAP, 4)
    made, gpu = simulate(monkeypatch, CHEAP, 4, ReplayProposer(answers, 0.9, 128), fixed=True)
    made.prepare()
    running = ask(made, gpu, NEW)[:2]
    for sequence in list(made.sequences.values())[2:]:
        made.cancel(sequence)
    for _ in range(6):
        made.step()
    before = [len(s.tokens) for s in running]
    gpu.calls.clear()
    made.submit([5] * 200, Params(2, ignore_eos=True), lambda _: None, text=False)
    while len(made.sequences) > 2:
        made.step()
    prefills, drafted = gpu.calls["prefill", "replay"], gpu.calls["verify", "replay"]
    assert prefills >= 4 and drafted >= prefills and set(gpu.calls) == {("prefill", "replay"), ("verify", "replay")}
    assert all(len(s.tokens) - n > 2 * drafted for s, n in zip(running, before, strict=True))
    made.close()
