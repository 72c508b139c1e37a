"""Which cases run, and what would allow the others."""

import pytest
import torch

from jet_export.bench.command import with_sweep
from jet_export.bench.measure import Case
from jet_export.bench.protocols import (
    Asked,
    Room,
    parse_batches,
    parse_contexts,
    plan_cases,
    rebuild,
    throughput_only,
    wanted,
)
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.bundle.memory import MemoryBudget
from jet_export.model.presets import jet_2b
from jet_export.utils.errors import JetExportError

COMMAND = ["jet-export", "build", "--model", "jet-2b", "--random-weights", "--max-batch-size=64"]
COMMAND += ["--max-seq-len", "8192"]


def manifest(batch: int = 64, seq: int = 8192, chunk: int = 2048) -> Manifest:
    return Manifest(
        model={"name": "jet-2b", "config": jet_2b().to_dict()},
        backend={"name": "inductor"},
        target={"device": "cuda"},
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        state_dtype="float32",
        limits=Limits(max_batch_size=batch, max_seq_len=seq, prefill_chunk=chunk),
        build={"command": COMMAND},
    )


def room(available: float = 80e9, **limits: int) -> Room:
    return Room.of(manifest(**limits), weights=int(3.9e9), available=int(available))


def test_the_papers_protocol_is_its_batches_and_chunks() -> None:
    cases, skipped, _ = plan_cases(Asked(protocol="paper"), room(1e13, batch=1024, seq=300_000))
    assert [(c.context, c.batch, c.chunk, c.new_tokens) for c in cases] == [
        (4096, 1024, 256, 128),
        (65536, 128, 2048, 128),
        (262144, 64, 2048, 128),
    ]
    assert not skipped


def test_the_paper_has_no_other_contexts() -> None:
    with pytest.raises(JetExportError, match="the paper has no context of 1024 tokens"):
        plan_cases(Asked(protocol="paper", contexts=(1024,)), room())


def test_a_case_beyond_the_limits_is_skipped_with_the_build_that_allows_it() -> None:
    _, skipped, _ = plan_cases(Asked(protocol="paper", contexts=(4096,)), room(1e13, chunk=128))
    (s,) = skipped
    assert s.reason == "batch 1024 exceeds max_batch_size 64"
    assert s.remedy == (
        "jet-export build --model jet-2b --random-weights --max-seq-len 8192 --max-batch-size 1024 "
        "--prefill-chunk 256 --force"
    )


def test_a_case_beyond_the_memory_says_which_batch_fits() -> None:
    r = room(20e9, batch=1024, seq=300_000)
    _, skipped, _ = plan_cases(Asked(protocol="paper", contexts=(65536,)), r)
    (s,) = skipped
    most = r.largest(65536 + 128, 2048)
    assert s.reason.endswith("20.0 GB are free") and s.remedy == f"--batch {most} fits"
    cases, skipped, _ = plan_cases(Asked(protocol="paper", contexts=(65536,), batches=(most,)), r)
    assert [c.batch for c in cases] == [most] and not skipped


def test_auto_is_the_largest_that_memory_and_limits_allow() -> None:
    cases, _, notes = plan_cases(Asked(protocol="latency", contexts=(4096,), batches=(0,)), room(1e12))
    assert [c.batch for c in cases] == [64]
    assert "max_batch_size; the memory holds" in notes[0] and "--max-batch-size" in notes[0]
    cases, _, notes = plan_cases(Asked(protocol="latency", contexts=(4096,), batches=(0,)), room(6e9))
    assert 1 < cases[0].batch < 64 and not notes


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    dtypes, sizes = Dtypes(model=torch.bfloat16, kv_cache=torch.bfloat16), {"max_seq_len": 4224, "prefill_chunk": 256}
    for available in (5 * 10**9, 10**10, 8 * 10**10):
        budget = MemoryBudget(config=jet_2b(), dtypes=dtypes, weights=4 * 10**9, available=available)
        n = budget.largest_batch(**sizes)
        needs = [budget.memory(Limits(max_batch_size=b, **sizes)).total for b in (n, n + 1)]
        assert needs[0] <= available < needs[1]
    budget = MemoryBudget(config=jet_2b(), dtypes=dtypes, weights=4 * 10**9, available=4 * 10**9)
    assert budget.largest_batch(**sizes) == 0


def test_latency_runs_one_sequence_and_repeats_its_fill() -> None:
    cases, _, _ = plan_cases(Asked(protocol="latency", contexts=(1024, 32768)), room(seq=40000))
    assert [(c.batch, c.chunk, c.repeats) for c in cases] == [(1, 1024, 10), (1, 2048, 10)]
    cases, _, _ = plan_cases(Asked(protocol="latency", contexts=(1024,), batches=(2,)), room())
    assert [c.repeats for c in cases] == [1]
    assert len(wanted(Asked(protocol="latency"), Limits(max_batch_size=1, max_seq_len=1, prefill_chunk=1))) == 5


def test_the_sweep_has_every_power_of_two_once_and_the_largest() -> None:
    cases = with_sweep([Case(batch=16, context=4096, chunk=256)], [], room(1e13, batch=100), 128)
    assert [c.batch for c in cases] == [16, 1, 2, 4, 8, 32, 64, 100]
    assert [c.fill for c in cases] == ["auto"] + 7 * ["synthetic"]


def test_a_context_is_swept_where_the_papers_batch_does_not_fit() -> None:
    """A full-attention baseline holds far fewer sequences than the paper's batch."""
    r = room(20e9, batch=1024, seq=70_000)
    cases, skipped, _ = plan_cases(Asked(protocol="paper", contexts=(65536,)), r)
    assert not cases and skipped
    swept = [c.batch for c in with_sweep(cases, skipped, r, 128)]
    most = r.largest(65536 + 128, 2048)
    assert swept[:2] == [1, 2] and swept[-1] == most < 128
    assert with_sweep([], skipped, room(20e9, batch=1024, seq=60_000), 128) == []  # longer than max_seq_len


def test_contexts_beyond_the_positions_are_throughput_only() -> None:
    assert not throughput_only(manifest(), 131072) and throughput_only(manifest(), 131073)


def test_an_unchanged_limit_is_not_in_the_command() -> None:
    assert rebuild(manifest(), Limits(max_batch_size=64, max_seq_len=9000, prefill_chunk=2048)).endswith(
        "--max-batch-size=64 --max-seq-len 9000 --force"
    )


def test_contexts_and_batches_as_typed() -> None:
    assert parse_contexts("1024,4k,1024") == (1024, 4096) and parse_contexts(None) is None
    assert (parse_batches("auto"), parse_batches("8,1"), parse_batches(None)) == ((0,), (8, 1), None)
    for text in ("", "1k,x", "0", "-1"):
        with pytest.raises(JetExportError, match="not a list of positive numbers"):
            parse_contexts(text)
    for text in ("0", "many", "-3", "1.5", "1,", "", "²", "1,٣"):
        with pytest.raises(JetExportError, match="neither auto nor positive numbers"):
            parse_batches(text)
