"""Drafts under penalties and grammars: a position's choice depends on the tokens before it, drafted ones included."""

import random
from dataclasses import replace

import pytest
from helpers.batching import tokens
from helpers.eager_bundle import eager_engine

pytest.importorskip("llguidance")

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.draft_model import DraftModel
from jet_export.runtime.drafts import LookupProposer, Proposer
from jet_export.runtime.grammar import Grammar
from jet_export.runtime.grammar_masks import AnswerMatcher
from jet_export.runtime.params import Output, Params
from jet_export.runtime.prompt_lookup import Match
from jet_export.runtime.replay import ReplayProposer
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer

LIMITS = Limits(max_batch_size=4, max_seq_len=2 * PAGE, prefill_chunk=64)
MOST, END = 4, 127
ARRAY = {"type": "array", "items": {"enum": ["abc"]}, "minItems": 4, "x-guidance": {"whitespace_flexible": False}}
REPEATS = [*b"abcabcabcabc"]


@pytest.fixture(scope="module")
def engine(device) -> EagerEngine:
    return EagerEngine(eager_engine(LIMITS, device=device).model, LIMITS, state_interval=3, rollback=MOST + 1)


def hot(seed: int, new: int, grammar: Grammar | None = None, **changes) -> Params:
    return Params(new, Sampling(temperature=0.9, seed=seed), grammar=grammar, **changes)


CASES = [
    (REPEATS, Params(20, repetition_penalty=1.3)),
    (REPEATS, hot(1, 20, frequency_penalty=0.6, presence_penalty=0.4)),
    (tokens(20, 1), hot(2, 18, repetition_penalty=1.5, logit_bias=((97, 6.0), (98, 6.0)), min_tokens=6)),
    (tokens(5, 2), hot(3, 30, Grammar.regex("([ab]{2}c)+"))),
    (tokens(5, 3), hot(4, 30, Grammar.regex("a{3,}b?"), logit_bias=((END, 3.0),), logprobs=2)),
    (tokens(5, 4), hot(5, 40, Grammar.choice(["hello hello hello", "hello hell"]))),
    (
        tokens(5, 5),
        hot(6, 40, Grammar.json_schema(ARRAY)),
    ),
    (tokens(5, 6), hot(7, 24, Grammar.regex("[a-c]{20}"), frequency_penalty=2.0, stop_ids=(99,), min_tokens=9)),
    (tokens(5, 7), hot(8, 12, Grammar.regex("(ab){3}"), stop=("aba",))),
    (tokens(5, 8), hot(10, 20, Grammar.regex("(ab){4}é?"))),  # ends where what may follow is not in the vocabulary
    (REPEATS, hot(9, 20)),
]


class Garbage:
    """Drafts at random, of the tokens that the cases are about and of tokens past what the grammars know."""

    guesses = True

    def __init__(self) -> None:
        self.rng = random.Random(0)

    def forget(self, sequence: RunningSequence) -> None:
        pass

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        return Match([self.rng.choice([97, 98, 99, 34, 44, END, 0]) for _ in range(self.rng.randint(0, most))], 0)

    def draft(self, sequences, offers, draw) -> list[list[int]]:
        return [offer.tokens for offer in offers]


def run(
    engine, proposer: Proposer | None, cases, *, overlap=False, **serving
) -> list[tuple[RunningSequence, list[Output]]]:
    made = BatchingEngine(
        engine, ByteTokenizer(), END, Serving(prefix_cache_bytes=0, **serving), overlap=overlap, proposer=proposer
    )
    if made.speculation:
        made.speculation.lengths.fixed = True
    out = []
    for prompt, params in cases:
        heard: list[Output] = []
        out.append((made.submit(prompt, params, heard.append), heard))
        made.step()
    while made.step():
        pass
    assert not made.sequences
    if made.metrics.drafts:
        assert sum(made.metrics.drafts.drafted) > 10
    return out


@pytest.fixture(scope="module")
def plain(engine):
    return run(engine, None, CASES)


def told(heard: list[Output]) -> list[tuple]:
    return [(o.token, o.text, o.finish_reason, o.logprob is None) for o in heard]


@pytest.mark.parametrize("which", range(5), ids=["lookup", "garbage", "right", "mostly right", "a model"])
def test_requests_have_the_outputs_of_plain_decoding(engine, plain, which: int) -> None:
    """Endings included: of the grammar inside a draft, of stop strings and tokens, and at the limit."""
    answers = [s for s, _ in plain]
    draft = EagerEngine(engine.model, LIMITS)
    proposers: list[Proposer] = [
        LookupProposer(),
        Garbage(),
        ReplayProposer(answers, 1.0, 128),
        ReplayProposer(answers, 0.7, 128),
        DraftModel(draft, 4),
    ]
    for (_, heard), (_, expected) in zip(
        run(engine, proposers[which], CASES, overlap=which in (0, 1, 4)), plain, strict=True
    ):
        assert told(heard) == told(expected)
    assert {s.finish_reason for s in answers} == {"stop", "length"}


def test_preempted_ones_too(engine) -> None:
    cases = [(tokens(PAGE - 3 * i, i), replace(CASES[n][1], max_new_tokens=16)) for i, n in enumerate((1, 3, 7, -1))]
    expected = [s.tokens for s, _ in run(engine, None, cases)]
    for host in (1 << 26, 0):
        found = run(engine, Garbage(), cases, kv_tokens=5 * PAGE, host_cache_bytes=host)
        assert [s.tokens for s, _ in found] == expected


def test_drafts_that_a_grammar_forbids_are_cut(engine) -> None:
    """So that no step is spent on them."""
    grammar = Grammar.regex("(ab){9}a")
    cases = [(tokens(5, 1), hot(1, 20, grammar))]
    ((sequence, _),) = run(engine, None, cases)
    right = ReplayProposer([sequence], 1.0, 128)
    made = BatchingEngine(engine, ByteTokenizer(), -1, Serving(prefix_cache_bytes=0), overlap=False, proposer=right)
    assert made.speculation is not None
    made.speculation.lengths.fixed = True
    made.submit(*cases[0], lambda _: None)
    while made.step():
        pass
    drafts = made.metrics.drafts
    assert drafts is not None and drafts.accepted == drafts.drafted and sum(drafts.drafted) >= 14
    wrong = [*sequence.tokens[:2], 120, 97]
    matcher = made.grammars.compile(grammar)
    assert AnswerMatcher(matcher, ()).valid(wrong) == 2
