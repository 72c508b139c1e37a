"""evaluation/compare.py: standard errors, and paired differences."""

import math
import random
import statistics

import pytest

from jet_export.evaluation.compare import Metric
from jet_export.utils.errors import JetExportError

RNG = random.Random(0)
EASE = [RNG.random() for _ in range(400)]  # of the documents
FIRST = [float(RNG.random() < e) for e in EASE]
SECOND = [a if RNG.random() < 0.95 else 1 - a for a in FIRST]  # answers much as the first does
A, B = (Metric("acc", dict(enumerate(values))) for values in (FIRST, SECOND))


def stderr(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def test_a_mean_has_the_harness_standard_error() -> None:
    found = A.estimate()
    assert found.value == pytest.approx(statistics.mean(FIRST))
    assert found.stderr == pytest.approx(stderr(FIRST))


def test_what_documents_have_in_common_cancels() -> None:
    difference = A.minus(B)
    assert difference.value == pytest.approx(A.estimate().value - B.estimate().value)
    assert difference.stderr == pytest.approx(stderr([a - b for a, b in zip(FIRST, SECOND, strict=True)]))
    assert difference.stderr is not None and difference.stderr < 0.5 * math.hypot(stderr(FIRST), stderr(SECOND))
    same = A.minus(A)
    assert (same.value, same.stderr) == (0, 0)


def test_bits_per_byte_is_a_ratio_of_sums() -> None:
    values = {0: (-10.0, 8), 1: (-30.0, 16)}
    assert Metric("bits_per_byte", values).estimate().value == pytest.approx(40 / 24 / math.log(2))


@pytest.mark.parametrize("name", ["bits_per_byte", "word_perplexity"])
def test_a_ratio_has_the_standard_error_of_resampled_documents(name) -> None:
    rng = random.Random(1)
    weights = [rng.randint(20, 400) for _ in range(300)]
    values = {i: (-w * rng.gauss(0.6, 0.1), w) for i, w in enumerate(weights)}
    draws = []
    for _ in range(600):
        some = {k: values[rng.randrange(300)] for k in range(300)}
        draws.append(Metric(name, some).estimate().value)
    assert Metric(name, values).estimate().stderr == pytest.approx(statistics.stdev(draws), rel=0.15)


def test_one_document_has_no_standard_error_and_others_no_difference() -> None:
    assert Metric("acc", {3: 1.0}).estimate().stderr is None
    with pytest.raises(JetExportError, match="not asked the same documents"):
        Metric("acc", {3: 1.0}).minus(Metric("acc", {4: 1.0}))


def test_perplexities_are_the_harness_figures() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    pairs = [(-10.0, 8), (-30.0, 16)]
    found = Metric("word_perplexity", dict(enumerate(pairs))).estimate().value
    assert found == pytest.approx(metrics.weighted_perplexity(pairs))
    found = Metric("perplexity", {0: -1.0, 1: -3.0}).estimate().value
    assert found == pytest.approx(metrics.perplexity([-1.0, -3.0]))
