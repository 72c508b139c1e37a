"""Compiles grammars with llguidance, once for each, off the thread that takes the steps.

llguidance finds the tokens that may come next from the bytes of the vocabulary when they are asked for, so compiling
costs milliseconds. What it may use is bounded: its limits, and a thread with a deep stack for each grammar, as it
recurses over rules and references.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from jet_export.runtime.grammar import Grammar
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# The work of one step is bounded to some ms: a grammar that needs more ends its request with an error.
MAX_STEP_ITEMS, MAX_ROW_ITEMS, MAX_LEXER_STATES, MAX_SYMBOLS = 5000, 2000, 50_000, 200_000
STACK = 1 << 29  # bytes of address space; 1 MB of references to each other need a quarter
MAX_CACHED, MAX_CACHED_BYTES = 64, 1 << 23  # grammars, and bytes of their texts
MAX_GBNF = 1 << 15  # characters, as translating it takes time that grows with their square
MAX_COMPILING = 64  # at once; further ones are refused
NOTHING = "NoExtension"  # in llguidance's error where no text can follow
MAX_REASON = 300  # characters
MAX_WHITESPACE = 32  # characters between two tokens of JSON: a model must not go on with them for ever


log = logging.getLogger(__name__)
OnCompiled = Callable[[JetExportError | None], None]


class CompiledGrammar:
    """A grammar for one tokenizer, which knows the tokens below `known`. Any thread may call `matcher`."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, known: int) -> None:
        self._matcher, self.tokenizer, self.known = matcher, tokenizer, known

    def matcher(self) -> LLMatcher:
        """A new one, at the start of the grammar."""
        return self._matcher.deep_copy()


class GrammarCompiler:
    """Of one engine; any thread may call it. `eos`: the engine's end-of-sequence tokens, of `vocab` ones."""

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer, vocab: int, eos: Sequence[int]) -> None:
        self.tokenizer, self.vocab, self.eos = tokenizer, vocab, tuple(eos)
        size = 256 if isinstance(tokenizer, ByteTokenizer) else tokenizer.largest_id + 1
        self.known = min(vocab, size)  # tokens
        self._lock = threading.Lock()
        self._cached: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._compiling: dict[Grammar, Future[CompiledGrammar]] = {}
        self._built: LLTokenizer | None = None

    def warm_up(self) -> None:
        """Build llguidance's form of the tokenizer, if llguidance is installed: a second for 150,000 tokens, in which
        no other thread runs Python."""
        with contextlib.suppress(JetExportError):  # the first request with a grammar is told
            self._tokenizer()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Waits for it. Raises JetExportError where it cannot be compiled."""
        return self._future(grammar).result()

    def start(self, grammar: Grammar, on_end: OnCompiled) -> None:
        """Compile it without waiting; `on_end(error)` is called from any thread, or here if it is known already.
        `compile` returns at once then."""

        def ended(future: Future[CompiledGrammar]) -> None:
            error = future.exception()
            assert error is None or isinstance(error, JetExportError)
            on_end(error)

        self._future(grammar).add_done_callback(ended)

    def _future(self, grammar: Grammar) -> Future[CompiledGrammar]:
        with self._lock:
            found = self._compiling.get(grammar)
            if found is not None:
                return found
            found = Future()
            if grammar in self._cached:
                self._cached.move_to_end(grammar)
                found.set_result(self._cached[grammar])
                return found
            if len(self._compiling) >= MAX_COMPILING:
                found.set_exception(QueueFull(f"{MAX_COMPILING} grammars are being compiled.", "Try again later."))
                return found
            self._compiling[grammar] = found
        with _STACK_SIZE:
            before = threading.stack_size(STACK)
            try:
                threading.Thread(target=self._run, args=(grammar, found), name="jet-grammar", daemon=True).start()
            finally:
                threading.stack_size(before)
        return found

    def _run(self, grammar: Grammar, future: Future[CompiledGrammar]) -> None:
        compiled, error = None, None
        try:
            compiled = self._compile(grammar)
        except JetExportError as e:
            error = e
        except Exception as e:
            log.exception("a grammar could not be compiled")
            error = JetExportError(f"The {grammar.name} cannot be compiled ({type(e).__name__}).")
        with self._lock:
            del self._compiling[grammar]
            if compiled is not None:
                self._cached[grammar] = compiled
                while len(self._cached) > 1 and (
                    len(self._cached) > MAX_CACHED or sum(len(g.text) for g in self._cached) > MAX_CACHED_BYTES
                ):
                    self._cached.popitem(last=False)
        if compiled is not None:
            future.set_result(compiled)
        else:
            future.set_exception(error)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        tokenizer = self._tokenizer()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            step_max_items=MAX_STEP_ITEMS,
            max_items_in_row=MAX_ROW_ITEMS,
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=MAX_SYMBOLS,
            verbose_errors=False,
        )
        matcher = LLMatcher(tokenizer, self._source(grammar, tokenizer), log_level=0, limits=limits)
        # The first masks cost most, and where they fail is found here.
        self._check(grammar, matcher)
        further = matcher.deep_copy()
        for piece in ("{", '"'):  # of an object, the first name is the hardest
            ids = tokenizer.greedy_tokenize(piece)
            if further.validate_tokens(ids) < len(ids):
                break
            further.consume_tokens(ids)
            self._check(grammar, further)
        return CompiledGrammar(matcher, tokenizer, self.known)

    def _check(self, grammar: Grammar, matcher: LLMatcher) -> None:
        """Raises JetExportError if no token can follow."""
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error() and NOTHING not in matcher.get_error():
            raise JetExportError(f"The {grammar.name} cannot be used: {_reason(matcher.get_error())}.")
        ends = sum(1 << token for token in self._tokenizer().eos_tokens)
        if not int.from_bytes(mask, "little") & ((1 << self.known) - 1) & ~ends:
            raise JetExportError(f"The {grammar.name} accepts no text that this vocabulary spells.")

    def _tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._built is None:
                try:
                    import llguidance  # noqa: F401
                except ImportError:
                    raise JetExportError(
                        "Structured output (response_format, grammars) needs llguidance.",
                        "Install it: pip install 'jet-export[structured]'",
                    ) from None
                self._built = build_tokenizer(self.tokenizer, self.vocab, self.eos)
            return self._built

    def _source(self, grammar: Grammar, tokenizer: LLTokenizer) -> str:
        """In llguidance's own JSON."""
        if grammar.kind == "json_schema":
            return f'{{"grammars":[{{"json_schema":{_with_options(grammar.text)}}}]}}'
        if grammar.kind == "lark":
            return _lark(grammar.text)
        if grammar.kind == "regex":
            from llguidance import LLMatcher

            return LLMatcher.grammar_from_regex(grammar.text)
        if grammar.kind == "choice":
            options = " | ".join(json.dumps(text) for text in json.loads(grammar.text))
            return _lark(f"start: CHOICE\nCHOICE: {options}\n")
        added = self.tokenizer.added_tokens
        return _lark(_tagged(json.loads(grammar.text), tokenizer, added))


def in_loop(loop: asyncio.AbstractEventLoop, on_end: OnCompiled) -> OnCompiled:
    """`on_end` as an event loop calls it, unless it is closed."""

    def call(error: JetExportError | None) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(on_end, error)

    return call


_QUOTED = re.compile(r"\s*\d+ \|.*|[\s^~-]*")
_STACK_SIZE = threading.Lock()  # of the threads that are started, which is one setting for all


def _with_options(schema: str) -> str:
    """With our defaults for `x-guidance`; a schema that brings its own comes after them."""
    pattern = f"[\\x20\\x0A\\x0D\\x09]{{1,{MAX_WHITESPACE}}}"
    options = json.dumps({"x-guidance": {"whitespace_pattern": pattern}}, separators=(",", ":"))
    schema = schema.strip()
    if schema in ("{}", "true"):
        return options
    return f"{options[:-1]},{schema[1:]}" if schema.startswith("{") else schema


def _lark(text: str) -> str:
    """`text`: Lark, or GBNF."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if not is_lark_syntax(text):
        if len(text) > MAX_GBNF:
            raise JetExportError(f"The GBNF grammar is longer than {MAX_GBNF} characters.", "Give it in Lark.")
        try:
            text = gbnf_to_lark(text)
        except Exception as e:  # its own, and what Python raises for deep nesting
            message = f"The grammar is neither Lark with a rule `start` nor GBNF: {_reason(str(e))}."
            raise JetExportError(message) from None
    return LLMatcher.grammar_from_lark(text)


def _tagged(tagged: dict[str, Any], tokenizer: LLTokenizer, added: dict[str, int]) -> str:
    """See Grammar.tagged, in Lark."""
    items = tagged["items"]
    if tagged["free"]:
        lines = [f"start: TEXT (item TEXT){'*' if tagged['several'] else '?'}", "TEXT: /(.|\\n)*/"]
        for text in (item["begin"] for item in items):
            if not _literal(text, tokenizer, added).startswith("<["):
                raise JetExportError(f"The tokenizer has no token {text.split(maxsplit=1)[0]}, with which calls begin.")
    else:
        lines = [f"start: item{' (NEWLINE item)*' if tagged['several'] else ''}", "NEWLINE: /\\n/"]
    lines.append("item: " + " | ".join(f"item_{i}" for i in range(len(items))))
    for i, item in enumerate(items):
        begin, end = (_literal(item[name], tokenizer, added) for name in ("begin", "end"))
        lines += [f"item_{i}: {begin} json_{i} {end}", f"json_{i}: %json {_with_options(json.dumps(item['schema']))}"]
    return "\n".join(lines)


def _literal(text: str, tokenizer: LLTokenizer, added: dict[str, int]) -> str:
    """A text in Lark, those of its parts that are special tokens as their ids."""
    special = [token for token, i in added.items() if tokenizer.is_special_token(i)]
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if special else [text]
    return " ".join(f"<[{added[p]}]>" if p in special else json.dumps(p) for p in parts if p)


def _reason(error: str) -> str:
    """llguidance's error, in a line."""
    for mark in ("<backtrace>", "<non-verbose/>"):
        error = error.partition(mark)[0]
    kept = [line for line in error.splitlines() if not _QUOTED.fullmatch(line)]  # without the grammar it quotes
    line = " ".join(" ".join(kept).split()).removeprefix("panic: ").rstrip(".")
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}..."


def build_tokenizer(tokenizer: Tokenizer | ByteTokenizer, vocab: int, eos: Sequence[int]) -> LLTokenizer:
    """llguidance's form of a tokenizer, for a model of `vocab` tokens. Raises JetExportError for one it cannot read."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if isinstance(tokenizer, ByteTokenizer):
        return LLTokenizer(TokenizerWrapper(_Bytes(vocab, eos)))
    size = tokenizer.largest_id + 1
    ends = [i for i in eos if i < size]
    try:
        return LLTokenizer(tokenizer.to_json(), n_vocab=max(vocab, size), eos_token=ends or None)
    except ValueError as e:
        raise JetExportError(f"Structured output does not know this tokenizer ({str(e)[:200]}).") from None


class _Bytes:
    """The vocabulary of ByteTokenizer; with a token of its own for the end where the model has none."""

    bos_token_id = None

    def __init__(self, vocab: int, eos: Sequence[int]) -> None:
        ends = [i for i in eos if i < vocab] or [max(vocab, 256)]
        tokens = [bytes([i]) for i in range(256)]
        tokens += [f"<[{i}]>".encode() for i in range(len(tokens), max(vocab, *ends) + 1)]
        self.tokens, self.eos_token_id = tokens, ends[0]
        self.special_token_ids = sorted({*ends, *range(256, len(tokens))})

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
