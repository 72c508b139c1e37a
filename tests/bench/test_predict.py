"""The largest batch within a time per token, predicted from measured steps, and the prediction's error."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from helpers.bench_rows import row
from helpers.scripts import load_script

from jet_export.bench.predict import (
    Prediction,
    StepTable,
    Target,
    committed_tables,
    fit_steps,
    left_out_errors,
    lines,
    predict,
)
from jet_export.bench.roofline import spaced_bytes, step_bytes
from jet_export.bench.rows import Row
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.memory import MemoryBudget, weight_bytes
from jet_export.cli import app as cli
from jet_export.model.cache import state_specs
from jet_export.model.presets import jet_2b
from jet_export.utils.errors import JetExportError

GPU = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_bytes": str(85_520_809_984)}
DTYPES = Dtypes(model=torch.bfloat16, kv_cache=torch.bfloat16)
WEIGHTS = weight_bytes(jet_2b(), torch.bfloat16, False)


def nbytes(batch: int, context: float) -> int:
    return step_bytes(jet_2b(), state_specs(jet_2b(), torch.bfloat16), WEIGHTS, batch, context).total


def measured(batch: int, context: int, noise: float = 0.0):
    """A step of 0.5 ms and 2.5 TB/s and 2 us a sequence."""
    total = nbytes(batch, context + 64)
    ms = (0.5 + total / 2.5e9 + 0.002 * batch) * (1 + noise)
    return row(batch, 1e3 * batch / ms, context=context, step_bytes={"weights": WEIGHTS, "total": total})


def target(context: int, tpot_ms: float) -> Target:
    return Target(tpot_ms=tpot_ms, context=context, prefill_chunk=2048)


def largest(table: StepTable, context: int, tpot_ms: float, available: float = 1e13) -> Prediction:
    budget = MemoryBudget(config=jet_2b(), dtypes=DTYPES, weights=WEIGHTS, available=int(available))
    return predict(budget, table, target(context, tpot_ms))


@pytest.fixture
def table(tmp_path) -> StepTable:
    rows = [measured(b, c) for b in (1, 16, 64) for c in (4096, 65536)]
    return StepTable(
        files=(tmp_path / "bench.json",),
        device="NVIDIA H100 80GB HBM3",
        date="2026-01-01",
        model="jet-2b",
        precision="bf16",
        rows=tuple(rows),
    )


def test_the_fit_recovers_the_terms_of_the_steps(table) -> None:
    fit = fit_steps([(r.step_bytes["total"], r.batch, r.step_seconds) for r in table.rows])
    assert (fit.overhead, 1 / fit.byte, fit.each) == pytest.approx((0.5e-3, 2.5e12, 2e-6), rel=1e-6)


def test_no_term_is_negative() -> None:
    fit = fit_steps([(1e9, 1, 0.9e-3), (2e9, 2, 2.1e-3), (3e9, 3, 3.1e-3), (4e9, 4, 4.2e-3)])
    assert min(fit.overhead, fit.byte, fit.each) >= 0 and fit.seconds(2e9, 2) == pytest.approx(2e-3, rel=0.1)


def quicker(r: Row) -> Row:
    """A step of 0.3 ms less."""
    return dataclasses.replace(r, decode_tokens_per_s=r.batch / (r.step_seconds - 0.3e-3))


@pytest.mark.parametrize("tpot", [2.5, 7.7, 20.0])
def test_the_batch_is_the_largest_within_the_time(table, tpot) -> None:
    p = largest(table, 65536, tpot)

    def ms(batch: int) -> float:
        return 0.5 + nbytes(batch, 65536) / 2.5e9 + 0.002 * batch

    want = max((b for b in range(1, 500) if ms(b) <= tpot), default=0)
    assert p.batch == want and p.bound == "time" and p.memory is not None and p.memory.total > 0
    assert p.tokens_per_s == pytest.approx(1e3 * want / ms(want))


def test_one_sequence_has_an_overhead_of_its_own(table) -> None:
    """A quicker step of one sequence, which a package of its own decodes, changes neither the fit nor its errors."""
    quick = [quicker(r) if r.batch == 1 else r for r in table.rows]
    faster = dataclasses.replace(table, rows=tuple(quick))
    one = 0.5 + nbytes(1, 65536) / 2.5e9 + 0.002
    for tpot, batches in ((one - 0.1, (0, 1)), (one - 0.31, (0, 0)), (7.7, None)):
        a, b = (largest(t, 65536, tpot) for t in (table, faster))
        assert b.fit == a.fit and b.errors == a.errors and len(b.errors) == 4
        assert (a.batch, b.batch) == batches if batches else a.batch == b.batch > 1
    p = largest(faster, 65536, one - 0.1)
    assert 1e3 * p.seconds == pytest.approx(one - 0.3, rel=0.01)  # at a context in the middle of a case's


def test_files_of_one_bundle_and_device_are_one_table(table, tmp_path, monkeypatch) -> None:
    from jet_export.bench import predict as module

    def write(name: str, rows, sha: str) -> Path:
        (tmp_path / name).mkdir()
        return Path(bench_json(tmp_path / name / "bench.json", rows, sha))

    first, second = write("a", table.rows[:3], "x"), write("b", table.rows[3:], "x")
    other = write("c", table.rows[:5], "y")
    monkeypatch.setattr(module, "committed_tables", lambda: [first, other, second])
    found = module.find_table("jet-2b", "bf16", None)
    assert found.rows == table.rows and found.files == (first, second)
    assert found.named.endswith("a/bench.json, b/bench.json")
    monkeypatch.setattr(module, "committed_tables", lambda: [first])
    with pytest.raises(JetExportError, match="at least 4 decode steps"):
        module.find_table("jet-2b", "bf16", None)


def test_a_table_that_cannot_tell_overhead_from_sequences_is_no_table(table, tmp_path, monkeypatch) -> None:
    """Steps of one batch or two, however many, do not determine the cost of a sequence."""
    from jet_export.bench import predict as module

    one = [measured(1, c) for c in (1024, 2048, 4096, 8192, 16384, 32768, 65536)]
    poor = tmp_path / bench_json(tmp_path / "poor.json", one, "x")
    two = tmp_path / bench_json(tmp_path / "two.json", [*one, measured(64, 4096)], "y")
    rich = tmp_path / bench_json(tmp_path / "rich.json", table.rows, "z")
    for file in (poor, two):
        with pytest.raises(JetExportError, match=r"at least 3 batches(?s:.*)--batch 1,8,64"):
            module.find_table("jet-2b", "bf16", file)
    monkeypatch.setattr(module, "committed_tables", lambda: [poor, two, rich])
    assert module.find_table("jet-2b", "bf16", None).files == (rich,)


@pytest.mark.parametrize(("model", "precision"), [("jet-4b", "bf16"), ("jet-2b", "bf16"), ("jet-2b", "fp8")])
def test_the_committed_tables_are_enough(model, precision) -> None:
    from jet_export.bench.predict import find_table

    assert find_table(model, precision, None).enough


def test_the_packages_tables_are_those_of_the_results() -> None:
    tables = load_script("tools/step_tables.py").tables()
    assert {p: p.read_text(encoding="utf-8") for p in committed_tables()} == tables, (
        "run benchmarks/tools/step_tables.py"
    )


def test_a_step_of_one_sequence_is_explained(table) -> None:
    """Its own fit and error are printed where the answer is one sequence."""
    quick = [quicker(r) if r.batch == 1 else r for r in table.rows]
    faster = dataclasses.replace(table, rows=tuple(quick))
    one = 0.2 + nbytes(1, 65536) / 2.5e9 + 0.002
    for tpot in (one + 0.01, one - 0.1):
        p = largest(faster, 65536, tpot)
        said = " ".join(lines(p, faster, target(65536, tpot)))
        assert "step of one sequence, fitted apart to 2 measured = 0.202 ms + 0.4 ms/GB; each predicted" in said
        assert p.alone is not None and p.alone.seconds(nbytes(1, 65536)) == p.seconds and max(p.alone.errors) < 1e-6
    several = largest(faster, 65536, 20)
    assert "one sequence" not in " ".join(lines(several, faster, target(65536, 20)))


def test_the_error_of_one_sequence_is_of_steps_left_out() -> None:
    from jet_export.bench.predict import fit_alone

    points = [(1e9, 1, 1.5e-3), (2e9, 1, 2.6e-3), (2e9, 8, 9e-3)]
    alone = fit_alone(points, 1e-12)
    assert (
        alone is not None
        and alone.overhead == pytest.approx(0.55e-3)
        and alone.errors == pytest.approx((0.1 / 1.5, 0.1 / 2.6))
    )
    single = fit_alone(points[:1], 1e-12)
    assert single is not None and single.errors == () and fit_alone(points[2:], 1e-12) is None


def test_memory_binds_where_time_does_not(table) -> None:
    p = largest(table, 65536, 1000, available=20e9)
    assert p.bound == "memory" and p.memory is not None and p.memory.total <= 20e9
    assert 0 < p.batch < largest(table, 65536, 1000, available=40e9).batch


def test_a_time_that_cannot_be_met(table) -> None:
    p = largest(table, 65536, 0.1, available=1e12)
    assert p.batch == 0 and p.memory is None
    assert "not reached: one sequence takes longer" in lines(p, table, target(65536, 0.1))[-1]


def test_the_error_is_of_steps_left_out(table) -> None:
    points = [(r.step_bytes["total"], r.batch, r.step_seconds) for r in table.rows]
    assert max(left_out_errors(points)) < 1e-6
    rng = random.Random(0)
    noisy = [(x, b, y * (1 + rng.uniform(-0.1, 0.1))) for x, b, y in points]
    errors = left_out_errors(noisy)
    fit = fit_steps(noisy[1:])
    assert errors[0] == pytest.approx(abs(fit.seconds(*noisy[0][:2]) / noisy[0][2] - 1))
    assert 0.005 < max(errors) < 0.5


def test_extrapolation_is_marked(table) -> None:
    p = largest(table, 131072, 50)
    text = " ".join(lines(p, table, target(131072, 50)))
    assert "lies outside the measured ones, 4096 to 65536: extrapolated" in text
    p = largest(table, 4096, 50)
    assert "beyond the largest measured, 64: extrapolated" in " ".join(lines(p, table, target(4096, 50)))


def inspect(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["jet-export", "inspect", *args])
    with pytest.raises(SystemExit) as e:
        cli.main()
    out = capsys.readouterr()
    return int(e.value.code or 0), out.out, out.err


def bench_json(path, rows, sha: str = "5e") -> str:
    bundle = {"model": "jet-2b", "manifest_sha256": sha, "rows": [dataclasses.asdict(r) for r in rows]}
    path.write_text(json.dumps({"environment": {**GPU, "date": "d"}, "bundles": [bundle]}))
    return str(path)


def test_inspect_prints_batch_speed_memory_and_error(table, tmp_path, monkeypatch, capsys) -> None:
    file = bench_json(tmp_path / "bench.json", table.rows)
    args = ("--model", "jet-2b", "--context", "65536", "--tpot-ms", "10", "--measured", file)
    status, out, _ = inspect(monkeypatch, capsys, *args)
    assert status == 0 and "is off by 0.0% (median)" in out and "largest batch within 10 ms" in out
    assert "NVIDIA H100 80GB HBM3" in out and "KV cache, full attention" in out


def test_the_prefill_chunk_counts_in_the_memory(table, tmp_path, monkeypatch, capsys) -> None:
    file = bench_json(tmp_path / "bench.json", table.rows)
    args = ("--model", "jet-2b", "--context", "65536", "--tpot-ms", "1e308", "--measured", file)
    outs = [inspect(monkeypatch, capsys, *args, *chunk)[:2] for chunk in ((), ("--prefill-chunk", "128"))]
    assert [status for status, _ in outs] == [0, 0] and outs[0] != outs[1] and "bound by memory" in outs[0][1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--context", "65536", "--tpot-ms", "20", "--fp8"], "no measured table of jet-2b fp8"),
        (["--tpot-ms", "20"], "needs --context and a positive time"),
        (["--context", "65536", "--tpot-ms", "0"], "needs --context and a positive time"),
        (["--context", "65536", "--tpot-ms", "inf"], "needs --context and a positive time"),
        (["--context", "65536", "--tpot-ms", "nan"], "needs --context and a positive time"),
        (["--context", "65536", "--tpot-ms", "20", "--batch", "8"], "--tpot-ms finds the batch itself"),
    ],
)
def test_without_a_table_inspect_says_how_to_make_one(table, tmp_path, monkeypatch, capsys, args, message) -> None:
    file = bench_json(tmp_path / "bench.json", table.rows)
    status, _, err = inspect(monkeypatch, capsys, "--model", "jet-2b", *args, "--measured", file)
    assert status == 2 and message in err
    if "fp8" in message:
        assert "jet-export bench BUNDLE" in err


def test_memory_is_that_of_the_gpu_that_was_measured(table, tmp_path) -> None:
    from jet_export.bench.predict import read_tables

    (read,) = read_tables(tmp_path / bench_json(tmp_path / "bench.json", table.rows))
    assert read.available() == int(0.92 * 85_520_809_984) and read.device == GPU["gpu"]


def test_files_without_a_table(tmp_path, monkeypatch, capsys) -> None:
    from jet_export.bench.predict import find_table

    (tmp_path / "x.json").write_text('{"environment": {}}')
    with pytest.raises(JetExportError, match=r"x.json: not a bench.json"):
        find_table("jet-2b", "bf16", tmp_path / "x.json")
    with pytest.raises(JetExportError, match="no such file"):
        find_table("jet-2b", "bf16", tmp_path / "y.json")
    with pytest.raises(JetExportError, match="at least 4 decode steps"):
        find_table("jet-2b", "bf16", tmp_path / bench_json(tmp_path / "few.json", [measured(1, 4096)]))


def test_a_bundle_that_writes_its_states_every_few_tokens_is_fitted_by_its_own_bytes(table) -> None:
    """Steps made of the bytes of an interval of 8: the same terms, and the larger batch that they allow."""
    spaced = Dtypes(model=torch.bfloat16, kv_cache=torch.bfloat16, state_interval=8)
    specs, rows = spaced.specs(jet_2b()), []
    for r in table.rows:
        every = step_bytes(jet_2b(), specs, WEIGHTS, r.batch, r.context + 64)
        total = spaced_bytes(every, specs, r.batch, 8).total
        ms, step = 0.5 + total / 2.5e9 + 0.002 * r.batch, {"weights": WEIGHTS, "total": total}
        new = row(r.batch, 1e3 * r.batch / ms, context=r.context, state_interval=8, interval_step_bytes=step)
        rows.append(dataclasses.replace(new, step_bytes=r.step_bytes))
    budget = MemoryBudget(config=jet_2b(), dtypes=spaced, weights=WEIGHTS, available=int(1e13))
    p = predict(budget, dataclasses.replace(table, rows=tuple(rows)), target(65536, 7.7))
    assert (p.fit.overhead, 1 / p.fit.byte, p.fit.each) == pytest.approx((0.5e-3, 2.5e12, 2e-6), rel=1e-6)
    assert p.batch > largest(table, 65536, 7.7).batch
