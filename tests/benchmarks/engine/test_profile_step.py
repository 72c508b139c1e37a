"""benchmarks/engine/profile_step.py: what its verify cases run, and that figures are of whole intervals."""

import pytest
import torch
from helpers.eager_bundle import eager_engine
from helpers.scripts import load_script

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=2, max_seq_len=256, prefill_chunk=16)


@pytest.fixture(scope="module")
def script():
    return load_script("engine/profile_step.py")


def test_a_verify_case_holds_all_its_tokens_and_writes_the_states_once_in_a_period(script) -> None:
    engine = EagerEngine(eager_engine(LIMITS).model, LIMITS, state_interval=4, rollback=4)
    run = script.synthetic_run(engine, 2, 20, 3)
    states = [p for s, p in zip(engine.specs, run.runner.states, strict=True) if s.name.endswith("recurrent_state")]
    step, wrote = script.verify_step(engine, run, 2), []
    for n in range(1, 7):
        before = [s.clone() for s in states]
        step()
        assert run.runner.context_lens == [20 + 3 * n] * 2
        wrote.append(not all(map(torch.equal, before, states)))
    period = script.step_period(4, 3)
    assert period == 2 and sum(wrote[2:]) == 2  # the tokens held are then as they are in each period


def test_steps_of_whole_periods_are_averaged(script, monkeypatch) -> None:
    """Of three steps two take 1 ms and one 4, and one of three launches the kernel that writes."""
    times, taken, profiled = [1.0, 1.0, 4.0], [0], []

    def step() -> None:
        taken[0] += 1

    def stopwatch(fn, device) -> float:
        fn()
        return times[taken[0] % 3]

    def kernel_launches(fn):
        begin = taken[0]
        fn()
        profiled.append(taken[0] - begin)
        return {"read_7": [0.5] * 3, "write": [0.3]}

    monkeypatch.setattr(script.timer, "stopwatch", stopwatch)
    monkeypatch.setattr(script.timer, "kernel_launches", kernel_launches)
    found = script.profile_steps(eager_engine(LIMITS), step, 3)
    assert found["ms"] == pytest.approx(2.0) and profiled == [3]
    assert found["kernels"] == [
        {"kernel": "read", "launches": 1.0, "us": 500.0},
        {"kernel": "write", "launches": 0.33, "us": 100.0},
    ]


def test_more_drafts_than_the_bundle_verifies_are_refused(script) -> None:
    engine = EagerEngine(eager_engine(LIMITS).model, LIMITS, rollback=3)
    with pytest.raises(JetExportError, match=r"--verify: 3 drafts; the bundle verifies 2\.\n.*--speculate N"):
        script.verify_step(engine, script.synthetic_run(engine, 1, 8, 4), 3)
