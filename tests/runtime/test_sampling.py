"""Sampling parameters: what is refused, and what they do to a request. The draw: tests/kernels/test_sampling.py."""

from typing import Any

import pytest
import torch
from helpers.eager_bundle import eager_llm

from jet_export.bundle.limits import Limits
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output, Params
from jet_export.runtime.sampling import Sampling
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=128, prefill_chunk=64)


@pytest.fixture(scope="module")
def llm(device):
    return eager_llm(LIMITS, device=device)


def tokens(llm, *asked: Params, eos: int = -1) -> list[list[int]]:
    """The tokens of one prompt under each of these parameters, all at once."""
    engine = BatchingEngine(llm.engine, llm.tokenizer, eos, Serving())
    heard: list[list[Output]] = [[] for _ in asked]
    for params, outputs in zip(asked, heard, strict=True):
        engine.submit([1, 2, 3], params, outputs.append)
    while engine.step():
        pass
    return [[o.token for o in outputs if o.token is not None] for outputs in heard]


def test_penalties_and_biases_change_the_tokens_as_they_say(llm) -> None:
    plain, never, forced = tokens(
        llm,
        Params(12),
        Params(12, presence_penalty=1000.0),
        Params(12, logit_bias=((7, 1000.0),)),
    )
    assert len(set(never)) == 12  # no token comes twice
    assert never[0] == plain[0] and forced == [7] * 12


def test_min_tokens_keeps_the_ends_away(llm) -> None:
    (plain,) = tokens(llm, Params(10))
    stopped, later = tokens(llm, Params(10, stop_ids=(plain[1],)), Params(10, stop_ids=(plain[1],), min_tokens=5))
    assert stopped == plain[: plain.index(plain[1]) + 1]
    assert len(later) >= 5 and plain[1] not in later[:5]
    (kept,) = tokens(llm, Params(10, min_tokens=5), eos=plain[0])
    assert len(kept) >= 5 and plain[0] not in kept[:5]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(llm) -> None:
    hot = [Params(10, Sampling(temperature=2.0, seed=seed)) for seed in (7, 7, 8)]
    a, b, c = tokens(llm, *hot)
    assert a == b and a != c


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
    ],
)
def test_bad_parameters_are_refused(field: str, value: Any) -> None:
    with pytest.raises(JetExportError, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("min_tokens", -1),
        ("logit_bias", ((3, float("nan")),)),
    ],
)
def test_bad_request_parameters_are_refused(field: str, value: Any) -> None:
    with pytest.raises(JetExportError, match=field):
        Params(4, **{field: value})


def test_a_row_of_nan_ends_with_an_error_in_greedy_too(llm, monkeypatch) -> None:
    engine = BatchingEngine(llm.engine, llm.tokenizer, -1, Serving())
    heard: list[list[Output]] = [[], []]
    for i, outputs in enumerate(heard):
        engine.submit([1, 2, 3 + i], Params(6, Sampling(temperature=float(i))), outputs.append)
    engine.step()
    decode = engine.runner.decode

    def spoilt(slots):
        logits = decode(slots).clone()
        logits[0, 5] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "decode", spoilt)
    while engine.step():
        pass
    assert heard[0][-1].finish_reason == "error" and heard[1][-1].finish_reason == "error"
    assert engine.scheduler.slots.used == 0
