"""No ratio is quoted over a slow baseline, and what the three comparisons compare."""

import pytest
from helpers.bench_rows import row

from jet_export.bench.ratios import MIN_BASELINE, baseline_name, compare, headline


def baseline(batch: int, decode: float, **changes):
    return row(batch, decode, model="qwen3-1.7b", **changes)


@pytest.mark.parametrize(("share", "quoted"), [(0.0, False), (0.6999, False), (MIN_BASELINE, True), (1.1, True)])
def test_a_baseline_under_70_percent_of_its_roofline_gives_no_ratio(share: float, quoted: bool) -> None:
    decode = compare("decode", "equal batch", row(1, 100), baseline(1, 50, decode_of_roofline=share))
    prefill = compare("prefill", "equal batch", row(1, 100), baseline(1, 50, prefill_of_roofline=share))
    for r in (decode, prefill):
        assert (r.ratio == 2.0 and not r.why) if quoted else (r.ratio is None and "of its own roofline" in r.why)
        assert r.baseline_of_roofline == share


def test_a_baselines_roofline_is_that_of_its_own_interval() -> None:
    slow = baseline(1, 50, decode_of_roofline=0.9, state_interval=8, decode_of_interval_roofline=0.6)
    assert compare("decode", "", row(1, 100), slow).ratio is None


def test_nan_is_no_roofline() -> None:
    assert compare("decode", "", row(1, 100), baseline(1, 50, decode_of_roofline=float("nan"))).ratio is None


def test_only_the_share_of_what_is_compared_counts() -> None:
    b = baseline(1, 50, decode_of_roofline=0.1, prefill_of_roofline=0.9)
    assert compare("prefill", "", row(1, 100), b).ratio == 2.0 and compare("decode", "", row(1, 100), b).ratio is None


def test_three_ways_of_comparing() -> None:
    ours = [row(1, 100), row(8, 700), row(64, 4000), row(512, 9000)]
    theirs = [baseline(1, 90), baseline(8, 400)]  # a step of 8 takes 20 ms; ours: 16 ms at 64, 57 ms at 512
    found = {(r.kind, r.at): r for r in headline(ours, theirs)}
    equal, inside, largest = (found["decode", at] for at in ("equal batch", "equal time per token", "largest batch"))
    assert (equal.batch, equal.baseline_batch, equal.ratio) == (8, 8, 700 / 400)
    assert (inside.batch, inside.baseline_batch, inside.ratio) == (64, 8, 10)
    assert (largest.batch, largest.baseline_batch, largest.ratio) == (512, 8, 22.5)
    assert found["prefill", "equal batch"].ratio == 700 / 400
    assert len(found) == 4


def test_contexts_are_compared_one_by_one() -> None:
    ours = [row(1, 100), row(1, 80, context=65536)]
    theirs = [baseline(1, 50), baseline(1, 5, context=65536), baseline(1, 5, context=9)]
    ratios = {r.context: r.ratio for r in headline(ours, theirs) if r.kind == "decode" and r.at == "equal batch"}
    assert ratios == {4096: 2.0, 65536: 16.0}


def test_the_baseline_is_called_shaped() -> None:
    assert baseline_name(baseline(1, 1)) == "Qwen3-1.7B-shaped bf16"
