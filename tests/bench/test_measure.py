"""The timer and the cases that `jet-export bench` and the search time."""

import time
from functools import partial

import pytest
import torch
from helpers.eager_bundle import eager_engine

from jet_export.backends.eager import EagerEngine
from jet_export.bench import timer
from jet_export.bench.measure import DROPPED, Case, Run, check_case, measure_case, measure_engine
from jet_export.bench.prompt_calls import REPEATS, measure_prompt_calls, prompt_sizes
from jet_export.bundle.limits import Limits
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=96, prefill_chunk=16)
LONG = Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=16)


@pytest.fixture(scope="module")
def engine():
    return eager_engine(LIMITS)


def test_the_timer_measures_durations_on_a_cpu():
    times = timer.compare(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, repeats=5, warmup=1, device="cpu"
    )
    assert 2 <= times["short"].median < 15
    assert 20 <= times["long"].median <= times["long"].p90


def test_variants_are_timed_in_turn():
    order: list[str] = []
    timer.compare({n: partial(order.append, n) for n in "ab"}, repeats=2, warmup=1, device="cpu")
    assert order == ["a", "b", "a", "b", "a", "b"]


def test_calls_divide():
    one, ten = (
        timer.compare({"x": lambda: time.sleep(0.01)}, repeats=3, warmup=0, calls=n, device="cpu")["x"].median
        for n in (1, 10)
    )
    assert one / 20 < ten < one / 5


def test_percentiles():
    values = [float(i) for i in range(100, 0, -1)]
    assert timer.percentile(values, 0.9) == 91 and timer.percentile(values, 0.99) == 100
    assert timer.summary([3.0]) == timer.Timing(3.0, 3.0)


def test_copy_speed_is_of_memory_moved():
    assert 1e8 < timer.copy_speed(2**22, "cpu") < 1e13


@pytest.mark.parametrize("fill", ["prefill", "synthetic"])
def test_a_case_decodes_every_sequence_at_its_context(engine, fill, monkeypatch):
    seen = []
    decode = type(engine).decode

    def recorded(self, ids, batch, states):
        seen.append(batch.context_lens.tolist())
        return decode(self, ids, batch, states)

    monkeypatch.setattr(type(engine), "decode", recorded)
    case = Case(batch=3, context=40, chunk=16, new_tokens=12, fill=fill, repeats=2)
    (m,) = measure_engine(engine, [case])
    assert seen[1:] == [[40 + i] * 3 for i in range(12)]  # after the warm-up
    assert m.filled_by == fill
    assert len(m.ttft) == (6 if fill == "prefill" else 0)
    assert 0 < m.step.median <= m.step.p90 and m.prefill_tokens_per_s > 0
    assert m.peak_bytes is None  # a CPU


def test_prefill_speed_and_time_to_first_token_are_of_one_fill(engine):
    (m,) = measure_engine(engine, [Case(batch=2, context=48, chunk=16, new_tokens=4, fill="prefill")])
    assert m.ttft[0] == m.ttft[1] == m.ttft_p99
    assert m.prefill_tokens_per_s == pytest.approx(2 * 48 / (m.ttft[0] * 1e-3))


def test_synthetic_states_are_finite_and_not_zero(engine):
    run = Run(engine, Case(batch=2, context=64, chunk=16, new_tokens=4), 0, False)
    run.synthesise()
    assert all(s.isfinite().all() and (s != 0).any(dim=-1).all() for s in run.runner.states)
    assert engine.decode(run.next, run.runner.batch([0, 1], [1, 1]), run.runner.states).isfinite().all()


def test_auto_gives_up_filling(engine):
    case = Case(batch=2, context=64, chunk=8, new_tokens=4)
    assert [m.filled_by for m in measure_engine(engine, [case], fill_seconds=1e-6)] == ["synthetic"]
    assert [m.filled_by for m in measure_engine(engine, [case], fill_seconds=60)] == ["prefill"]


def test_fills_are_repeated_while_the_time_allows(engine, monkeypatch):
    """Each takes 4 s of this clock, 2 s a call: another begins only if it would end in time."""
    clock = [0.0]
    monkeypatch.setattr("jet_export.bench.measure.time.monotonic", lambda: clock[0])

    def call(fn, device):
        fn()
        clock[0] += 2
        return 2e3

    monkeypatch.setattr("jet_export.bench.measure.stopwatch", call)
    case = Case(batch=1, context=32, chunk=16, new_tokens=4, repeats=5)
    for seconds, fills in ((3, 0), (7, 1), (9, 2), (60, 5)):
        clock[0] = 0.0
        (m,) = measure_engine(engine, [case], fill_seconds=seconds)
        assert (len(m.ttft), m.filled_by) == (fills, "prefill" if fills else "synthetic")
        assert m.prefill_tokens_per_s == pytest.approx(8)


def test_the_first_steps_are_dropped(engine, monkeypatch):
    ticks = iter(range(1, 1000))  # the first is the prefill call's
    monkeypatch.setattr("jet_export.bench.measure.stopwatch", lambda fn, device: fn() or float(next(ticks)))
    (m,) = measure_engine(engine, [Case(batch=1, context=16, chunk=16, new_tokens=DROPPED + 20, fill="prefill")])
    assert m.step.median == pytest.approx(2 + DROPPED + 9.5)


@pytest.mark.parametrize(("new", "timed"), [(27, 16), (12, 8), (9, 8)])
def test_tokens_a_second_are_of_whole_intervals_between_two_writes_of_the_states(new, timed, monkeypatch):
    """Of a clock by which a step takes 1 ms, and one that writes the states 9: 2 ms on average, whatever the number of
    steps; the median step is a cheap one."""
    spaced = EagerEngine(eager_engine(LONG).model, LONG, state_interval=8)
    steps: list[float] = []

    def call(fn, device):
        before = [s.clone() for s in written]
        fn()
        wrote = any((a != b).any() for a, b in zip(before, written, strict=True))
        steps.append(9.0 if wrote else 1.0)
        return steps[-1]

    run = Run(spaced, Case(batch=2, context=16, chunk=16, new_tokens=new), 0, False)
    written = [p for s, p in zip(spaced.specs, run.runner.states, strict=True) if s.name.endswith("recurrent_state")]
    monkeypatch.setattr("jet_export.bench.measure.stopwatch", call)
    monkeypatch.setattr("jet_export.bench.measure.Run", lambda *args: run)
    m = measure_case(spaced, Case(batch=2, context=16, chunk=16, new_tokens=new, fill="synthetic"), 0, 1, False)
    decoded = steps[-new:]
    assert [i for i, ms in enumerate(decoded) if ms == 9.0] == list(range(8, new, 8))
    assert m.decode_tokens_per_s == pytest.approx(2 / 2e-3)
    assert m.step == timer.summary(decoded[-timed:]) and m.step.median == 1.0


def test_fewer_tokens_than_an_interval_are_refused(engine):
    spaced = EagerEngine(engine.model, LIMITS, state_interval=8)
    with pytest.raises(JetExportError, match=r"8 new tokens; states are written every 8 tokens.*\n.*at least 9"):
        measure_engine(spaced, [Case(batch=1, context=16, chunk=16, new_tokens=8)])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(batch=5, context=16, chunk=16, new_tokens=4), "batch 5 exceeds max_batch_size 4"),
        (Case(batch=1, context=94, chunk=16, new_tokens=4), "context 94 and 4 new tokens exceed max_seq_len 96"),
        (Case(batch=1, context=16, chunk=32, new_tokens=4), "chunk 32 exceeds prefill_chunk 16"),
    ],
)
def test_a_case_that_does_not_fit_is_refused(engine, case, message):
    assert check_case(case, LIMITS) == message
    with pytest.raises(JetExportError, match=message):
        measure_engine(engine, [case])


def test_sizes_and_fills_are_checked(engine):
    with pytest.raises(JetExportError, match="sizes must be positive"):
        measure_engine(engine, [Case(batch=0, context=16, chunk=16, new_tokens=4)])
    with pytest.raises(JetExportError, match="fill 'noise' is not known"):
        measure_engine(engine, [Case(batch=1, context=16, chunk=16, new_tokens=4, fill="noise")])


@pytest.mark.parametrize(
    ("longest", "sizes"),
    [(1, [1]), (16, [8, 16]), (96, [64, 96]), (256, [64, 128, 256]), (4096, [64, 128, 256, 512, 1024, 2040])],
)
def test_prompt_calls_have_sizes_up_to_the_longest_captured_one(longest: int, sizes: list[int]) -> None:
    assert prompt_sizes(longest) == sizes


def test_a_prompts_call_has_its_tokens_and_no_state_before(engine, monkeypatch) -> None:
    seen: list[tuple[int, int]] = []
    prefill = EagerEngine.prefill

    def watched(self, ids, batch, *args):
        seen.append((len(ids), int(batch.context_lens.max())))
        return prefill(self, ids, batch, *args)

    monkeypatch.setattr(EagerEngine, "prefill", watched)
    calls = measure_prompt_calls(engine, longest=64)  # its chunk has 16
    assert [c.tokens for c in calls] == [8, 16] and min(c.ms for c in calls) > 0
    assert set(seen) == {(8, 0), (16, 0)} and len(seen) == 2 * (REPEATS + 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_measuring_on_a_gpu():
    (m,) = measure_engine(eager_engine(LIMITS, device="cuda"), [Case(batch=2, context=40, chunk=16, new_tokens=12)])
    assert m.step.median > 0 and m.peak_bytes is not None and m.peak_bytes > m.state_bytes > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peaks_of_a_gpu():
    """Any GPU that runs this copies at over 100 GB/s and multiplies at over 1 TFLOP/s; FP8 no slower than bf16."""
    assert 1e11 < timer.copy_speed(2**28) < 1e14
    bf16 = timer.matmul_speed(torch.bfloat16)
    assert 1e12 < bf16 < 1e16
    if torch.cuda.get_device_capability() >= (8, 9):
        assert timer.matmul_speed(torch.float8_e4m3fn) > 0.9 * bf16
