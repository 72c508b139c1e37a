"""evaluation/compare.py: standard errors, and paired differences."""

import math
import random
import statistics

import pytest

from jet_export.evaluation.compare import Metric
from jet_export.utils.errors import JetExportError

RNG = random.Random(0)
EASE = [RNG.random() for _ in range(400)]  # of the documents
A = Metric("acc", {i: float(RNG.random() < e) for i, e in enumerate(EASE)})
B = Metric("acc", {i: a if RNG.random() < 0.95 else 1 - a for i, a in A.values.items()})  # answers much as A does


def test_a_mean_has_the_harness_standard_error() -> None:
    values = list(A.values.values())
    found = A.estimate()
    assert found.value == pytest.approx(statistics.mean(values))
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


def test_what_documents_have_in_common_cancels() -> None:
    difference = A.minus(B)
    assert difference.value == pytest.approx(A.estimate().value - B.estimate().value)
    changes = [A.values[i] - B.values[i] for i in A.values]
    assert difference.stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(len(changes)))
    assert difference.stderr < 0.5 * math.hypot(A.estimate().stderr, B.estimate().stderr)
    same = A.minus(A)
    assert (same.value, same.stderr) == (0, 0)


def test_bits_per_byte_is_a_ratio_of_sums() -> None:
    values = {0: (-10.0, 8), 1: (-30.0, 16)}
    assert Metric("bits_per_byte", values).estimate().value == pytest.approx(40 / 24 / math.log(2))


def test_a_ratio_has_the_standard_error_of_resampled_documents() -> None:
    rng = random.Random(1)
    weights = [rng.randint(20, 400) for _ in range(300)]
    values = {i: (-w * rng.gauss(0.6, 0.1), w) for i, w in enumerate(weights)}
    draws = []
    for _ in range(600):
        some = {k: values[rng.randrange(300)] for k in range(300)}
        draws.append(Metric("bits_per_byte", some).estimate().value)
    assert Metric("bits_per_byte", values).estimate().stderr == pytest.approx(statistics.stdev(draws), rel=0.15)


def test_one_document_has_no_standard_error_and_others_no_difference() -> None:
    assert Metric("acc", {3: 1.0}).estimate().stderr is None
    with pytest.raises(JetExportError, match="not asked the same documents"):
        Metric("acc", {3: 1.0}).minus(Metric("acc", {4: 1.0}))
