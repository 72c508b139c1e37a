"""The masks of a tokenizer with tokens of several bytes, in a model whose vocabulary is padded."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from jet_export.runtime.grammar import Grammar
from jet_export.runtime.grammar_compile import GrammarCompiler
from jet_export.runtime.grammar_masks import AnswerMatcher, TokenMasks
from jet_export.runtime.sampler import unpacked
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from jet_export.utils.errors import JetExportError

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


def test_masks_behind_a_draft_are_those_of_the_tokens_one_by_one(compiler) -> None:
    """Where the draft stops matching every token is allowed; the matcher itself stays where it is."""
    grammar, tokenizer = Grammar.json_object(), compiler.tokenizer
    text = tokenizer.encode('{"a": [1, true, {"b": "cd"}]}')
    masks = TokenMasks(40, VOCAB, torch.device("cpu"))
    ours, plain = matcher(compiler, grammar), matcher(compiler, grammar)
    draft = [*text[:6], tokenizer.encode("}")[-1], *text[6:8]]
    rows = masks.fill([None, ours], [[5], draft]).clone()
    assert (rows[:2] == -1).all() and (rows[2 + 7 :] == -1).all() and ours.accepted == 0
    for i, token in enumerate([*text[:6], None]):
        assert torch.equal(rows[2 + i], masks.fill([plain])[0])
        if token is not None:
            plain.accept(token)
    assert ours.valid(draft) == 6 and ours.valid([END]) == 0 and ours.valid([VOCAB - 1]) == 0


def test_an_end_that_a_draft_would_have_reached_is_forgotten_with_it() -> None:
    """The answer took another way of as many tokens, the last of them the same. The grammar ends where only a byte
    could follow that is not in the vocabulary."""
    grammar = GrammarCompiler(ByteTokenizer(), 128, (END,)).compile(Grammar.regex("aacé?|abcc+"))
    m, masks = AnswerMatcher(grammar, (END,)), TokenMasks(9, 128, torch.device("cpu"))
    masks.fill([m], [[*b"aac"]])
    assert m.ahead == (3, ord("c"))
    for token in b"ab":
        m.accept(token)
    masks.fill([m])
    for token in b"cc":
        m.accept(token)
        assert m.closed < 0 and not m.error


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


CALL, CALLED = "<tool_call>", "</tool_call>"
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
ITEMS = [(f"{CALL}\n", {**CITY, "additionalProperties": False}, f"\n{CALLED}")]


@pytest.fixture(scope="module", params=[False, True], ids=["added", "special"])
def chat_compiler(request, tmp_path_factory) -> GrammarCompiler:
    """jet-tiny's tokens and two that delimit calls, declared as the published tokenizer does, or as special ones."""
    tokens = tokenizers.Tokenizer.from_file(str(JET_TINY / "tokenizer.json"))
    delimiters = [tokenizers.AddedToken(text, special=request.param) for text in (CALL, CALLED)]
    (tokens.add_special_tokens if request.param else tokens.add_tokens)(delimiters)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokens.save(str(path))
    return GrammarCompiler(Tokenizer(path), VOCAB, (END,))


@pytest.mark.parametrize(
    ("answer", "several", "fits"),
    [
        ("Hello.\n<b>", True, True),
        (f'Well, {CALL}\n{{"city": "Rome"}}\n{CALLED} then', True, True),
        (f'{CALL}\n{{"city": "Rome"}}\n{CALLED}\n{CALL}\n{{"city": "Oslo"}}\n{CALLED}', True, True),
        (f'{CALL}\n{{"city": "Rome"}}\n{CALLED}\n{CALL}\n{{"city": "Oslo"}}\n{CALLED}', False, False),
        (f'{CALL}\n{{"city": "Bonn"}}\n{CALLED}', True, False),
        (f'{CALL}\n{{"city": "Rome", "day": 1}}\n{CALLED}', True, False),
        (f'{CALL}\n{{"city": "Rome"}}', True, False),  # begun and not ended
        (f"{CALLED}", True, False),
    ],
)
def test_free_text_around_what_is_tagged(chat_compiler, answer: str, several: bool, fits: bool) -> None:
    m = matcher(chat_compiler, Grammar.tagged(ITEMS, several=several, free=True))
    for token in [*chat_compiler.tokenizer.encode(answer), END]:
        (mask,) = allowed(m)
        if not mask[token]:
            assert not fits
            return
        m.accept(token)
    assert fits and not m.error


def test_free_text_needs_a_token_that_begins_a_call(compiler) -> None:
    with pytest.raises(JetExportError, match="no token <tool_call>"):
        compiler.compile(Grammar.tagged(ITEMS, free=True))
