"""The headline ratios: a model beside a full-attention baseline, both through the same code, kernels and engine.

Decoding is compared in three ways, each at one context:

    equal batch            the largest batch that both were measured at
    equal time per token   the most tokens/s of each among the batches whose step is no longer than the baseline's
                           step at its own largest batch
    largest batch          each at the largest batch it was measured at

and prefill at the largest common batch. A ratio is quoted only where the baseline comes near its own roofline: below
MIN_BASELINE the ratio would show a slow baseline, not a fast model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jet_export.bench.rows import Row

MIN_BASELINE = 0.70  # of the baseline's own roofline
SHAPED = {"qwen3-1.7b": "Qwen3-1.7B-shaped"}  # random weights of these sizes, not the published model


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """ours / baseline in tokens/s. ratio None: not quoted, and `why` says so."""

    kind: str  # "decode" or "prefill"
    at: str  # "equal batch", "equal time per token" or "largest batch"
    context: int
    baseline: str
    batch: int
    baseline_batch: int
    tokens_per_s: float
    baseline_tokens_per_s: float
    baseline_of_roofline: float
    ratio: float | None
    why: str
    throughput_only: bool


def baseline_name(row: Row) -> str:
    return f"{SHAPED.get(row.model, row.model)} {row.precision}"


def headline(ours: Sequence[Row], baseline: Sequence[Row]) -> list[Ratio]:
    """Every ratio that these measurements allow; `baseline` is one bundle's rows."""
    out: list[Ratio] = []
    for context in sorted({r.context for r in ours} & {r.context for r in baseline}):
        mine = {r.batch: r for r in ours if r.context == context}
        theirs = {r.batch: r for r in baseline if r.context == context}
        common = max(mine.keys() & theirs.keys(), default=None)
        if common is not None:
            out.append(compare("decode", "equal batch", mine[common], theirs[common]))
        limit = theirs[max(theirs)].step_seconds
        inside = [r for r in mine.values() if r.step_seconds <= limit]
        if inside:
            best = max(inside, key=lambda r: r.decode_tokens_per_s)
            rival = max((r for r in theirs.values() if r.step_seconds <= limit), key=lambda r: r.decode_tokens_per_s)
            out.append(compare("decode", "equal time per token", best, rival))
        out.append(compare("decode", "largest batch", mine[max(mine)], theirs[max(theirs)]))
        if common is not None:
            out.append(compare("prefill", "equal batch", mine[common], theirs[common]))
    return out


def compare(kind: str, at: str, ours: Row, baseline: Row) -> Ratio:
    """One ratio, or why it is not quoted."""
    share = baseline.of_own_roofline if kind == "decode" else baseline.prefill_of_roofline
    mine, theirs = (r.decode_tokens_per_s if kind == "decode" else r.prefill_tokens_per_s for r in (ours, baseline))
    quoted = share >= MIN_BASELINE
    why = f"not quoted: the baseline reaches {share:.0%} of its own roofline, under {MIN_BASELINE:.0%}"
    return Ratio(
        kind=kind,
        at=at,
        context=ours.context,
        baseline=baseline_name(baseline),
        batch=ours.batch,
        baseline_batch=baseline.batch,
        tokens_per_s=mine,
        baseline_tokens_per_s=theirs,
        baseline_of_roofline=share,
        ratio=mine / theirs if quoted else None,
        why="" if quoted else why,
        throughput_only=ours.throughput_only or baseline.throughput_only,
    )
