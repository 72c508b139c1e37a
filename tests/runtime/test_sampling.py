"""Sampling: greedy, the definitions of top-k and top-p, and reproducibility."""

from typing import Any

import pytest
import torch

from jet_export.runtime.sampling import Sampler, Sampling, filtered_probs
from jet_export.utils.errors import JetExportError

CPU = torch.device("cpu")


def test_temperature_zero_is_argmax() -> None:
    logits = torch.randn(5, 50)
    assert torch.equal(Sampler(Sampling(), CPU)(logits), logits.argmax(-1))


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_keeps_the_k_most_likely(k: int) -> None:
    logits = torch.randn(4, 50)
    probs = filtered_probs(logits, k, 1.0)
    assert ((probs > 0).sum(-1) == k).all()
    kept = probs > 0
    assert (logits.masked_fill(kept, -1e9).max(-1).values < logits.masked_fill(~kept, 1e9).min(-1).values).all()
    assert torch.allclose(probs.sum(-1), torch.ones(4))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float) -> None:
    logits = torch.randn(6, 50)
    full, probs = logits.softmax(-1), filtered_probs(logits, 0, p)
    for row, kept in zip(full, probs > 0, strict=True):
        mass = row[kept].sum()
        assert mass >= p - 1e-6
        assert mass - row[kept].min() < p  # without its least likely token it does not reach p


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, -1)
    tokens = Sampler(Sampling(temperature=0.7, seed=1), CPU)(logits)
    expected = (logits[0] / 0.7).softmax(-1)
    assert torch.allclose(tokens.bincount(minlength=4) / 20000, expected, atol=0.015)


def test_same_seed_same_tokens() -> None:
    logits = torch.randn(64, 100)
    a, b, c = (Sampler(Sampling(temperature=1.0, seed=s), CPU)(logits) for s in (7, 7, 8))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5), ("top_k", -2)],
)
def test_bad_parameters_are_refused(field: str, value: float) -> None:
    with pytest.raises(JetExportError, match=field):
        values: dict[str, Any] = {field: value}
        Sampling(**values)
