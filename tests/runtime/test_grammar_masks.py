"""The masks of a tokenizer with tokens of several bytes, in a model whose vocabulary is padded."""

import json

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from jet_export.runtime.grammar import Grammar
from jet_export.runtime.grammar_compile import GrammarCompiler
from jet_export.runtime.grammar_masks import AnswerMatcher, TokenMasks
from jet_export.runtime.sampler import unpacked
from jet_export.runtime.tokenizer import Tokenizer, load_tokenizer

JET_TINY = ROOT / "jet_export" / "data" / "jet-tiny"
VOCAB, END = 4200, 0


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(load_tokenizer(JET_TINY), VOCAB, (END,))


def allowed(*matchers: AnswerMatcher | None) -> np.ndarray:
    """[N, VOCAB] bool."""
    masks = TokenMasks(len(matchers), VOCAB, torch.device("cpu"))
    return np.stack([unpacked(row, VOCAB) for row in masks.fill(matchers)])


def matcher(compiler: GrammarCompiler, grammar: Grammar) -> AnswerMatcher:
    return AnswerMatcher(compiler.compile(grammar), (END,))


texts = st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(texts, values, max_size=3), st.sampled_from([None, 2]))
def test_the_tokens_of_a_text_that_matches_are_allowed_one_after_the_other(compiler, value, indent) -> None:
    tokenizer = compiler.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    m = matcher(compiler, Grammar.json_object())
    for token in tokenizer.encode(json.dumps(value, ensure_ascii=False, indent=indent)):
        (mask,) = allowed(m)
        assert m.closed < 0 and mask[token] and not mask[END] and not mask[tokenizer.largest_id + 1 :].any()
        m.accept(token)
    assert m.closed == m.accepted and not m.error
    (mask,) = allowed(m)
    assert mask.nonzero()[0].tolist() == [END]


def test_the_end_is_allowed_where_the_grammar_accepts(compiler) -> None:
    m = matcher(compiler, Grammar.regex("(ab)+"))
    for token in compiler.tokenizer.encode("a") + compiler.tokenizer.encode("b"):
        assert not allowed(m)[0][END]
        m.accept(token)
    assert allowed(m)[0][END] and m.closed < 0
    m.accept(END)
    assert not m.error
    m.rewind([])
    assert not allowed(m)[0][END]


def test_a_token_outside_the_tokenizer_is_never_allowed(compiler) -> None:
    with pytest.raises(Exception, match="accepts no text"):
        AnswerMatcher(compiler.compile(Grammar.lark("start: <[4150]>")), (END,))
    m = matcher(compiler, Grammar.lark('start: "a" | <[4150]>'))
    assert not allowed(m)[0][4096:].any() and allowed(m)[0].any()


def test_rows_without_a_grammar_and_rows_that_fail_allow_everything(compiler) -> None:
    good, bad = (matcher(compiler, Grammar.choice(["yes", "no"])) for _ in range(2))
    bad.accept(compiler.tokenizer.encode("x")[0])
    rows = allowed(None, good, bad)
    assert bad.error and rows[0].all() and rows[2].all() and 0 < rows[1].sum() < 10
    bad.rewind([])
    assert bad.error  # it stays
