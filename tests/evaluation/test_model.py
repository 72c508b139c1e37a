"""evaluation/model.py: the engine's answers to the harness's three kinds of requests."""

from types import SimpleNamespace

import pytest
import torch
from helpers.eager_bundle import eager_engine, eager_llm

pytest.importorskip("lm_eval")

from jet_export.bundle.limits import Limits
from jet_export.evaluation.model import EngineLM
from jet_export.runtime.runner import Runner
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=3, max_seq_len=96, prefill_chunk=64)
PREFIX = 7


@pytest.fixture
def model() -> EngineLM:
    return EngineLM(eager_llm(LIMITS), PREFIX)


def requests(*args) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=a) for a in args]


def forward(tokens: list[int]) -> torch.Tensor:
    """ln of the probabilities behind each token: [n, vocab], in one call."""
    runner = Runner(eager_engine(Limits(max_batch_size=1, max_seq_len=128, prefill_chunk=128)))
    return runner.prefill([0], [tokens], all_logits=True).log_softmax(-1)


def expected(context: list[int], continuation: list[int]) -> float:
    rows = forward([*context, *continuation])
    return sum(float(rows[len(context) - 1 + k, t]) for k, t in enumerate(continuation))


def test_loglikelihood_is_that_of_one_forward_pass_in_the_order_of_the_requests(model) -> None:
    pairs = [("the quick brown", " fox"), ("a", "b"), ("", "begin"), ("x" * 60, " y"), ("two  ", "words"), ("q", "rs")]
    found = model.loglikelihood(requests(*pairs))
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        tokens = list(context.rstrip(" ").encode()) or [PREFIX]
        rest = list(f"{context}{continuation}".encode()[len(tokens) if context else 0 :])
        assert logprob == pytest.approx(expected(tokens, rest), abs=1e-3)


def test_greedy_is_what_greedy_decoding_gives(model) -> None:
    context = list(b"some context")
    (best,) = model.llm.generate([context], 3, ignore_eos=True)
    other = [*best.token_ids[:2], (best.token_ids[2] + 1) % 128]
    found = model.score([(None, context, best.token_ids), (None, context, other)], "loglikelihood")
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_a_context_too_long_loses_its_beginning_and_is_counted(model) -> None:
    context, continuation = [(5 * i) % 128 for i in range(200)], [1, 2, 3]
    ((logprob, _),) = model.score([(None, context, continuation)], "loglikelihood")
    assert logprob == pytest.approx(expected(context[-(95 - 3) :], continuation), abs=1e-3)
    assert dict(model.truncated) == {"loglikelihood": 1}


@pytest.mark.parametrize("length", [1, 93, 94, 95, 250])
def test_rolling_predicts_every_token_once_with_windows_of_the_models_length(model, length) -> None:
    text = "".join(chr(97 + (i * i) % 26) for i in range(length))
    tokens = [PREFIX, *text.encode()]
    (found,) = model.loglikelihood_rolling(requests((text,)))
    window, total = model.max_length - 1, 0.0
    total += expected(tokens[:1], tokens[1 : window + 1])
    at = window + 1
    while at < len(tokens):  # the last window has as much context as fits
        end = min(at + window, len(tokens))
        first = end - window - 1
        total += expected(tokens[first:at], tokens[at:end])
        at = end
    assert found == pytest.approx(total, abs=2e-3)
    assert not any(model.truncated.values())


def test_generate_until_is_generate_cut_at_the_stop(model) -> None:
    prompts = ["first", "a second one", "3", "the fourth"]
    whole = [c.text for c in model.llm.generate(prompts, 8)]
    assert model.generate_until(requests(*((p, {"until": [], "max_gen_toks": 8}) for p in prompts))) == whole
    stop = whole[1][3:5]
    (cut,) = model.generate_until(requests((prompts[1], {"until": [stop], "max_gen_toks": 8})))
    assert cut == whole[1][: whole[1].index(stop)]


def test_an_answer_that_cannot_fit_is_refused(model) -> None:
    with pytest.raises(JetExportError, match="generates up to 95 tokens; the bundle's max_seq_len is 96"):
        model.generate_until(requests(("a", {"until": [], "max_gen_toks": 95})))


def test_an_engine_that_fails_ends_the_evaluation(model, monkeypatch) -> None:
    def broken(*args, **options):
        raise RuntimeError("no such device")

    monkeypatch.setattr(model.llm.runner, "prefill", broken)
    with pytest.raises(JetExportError, match="The engine failed \\(no such device\\)"):
        model.loglikelihood(requests(*[("a", "b")] * 9))
    assert not model.llm.batching.sequences
