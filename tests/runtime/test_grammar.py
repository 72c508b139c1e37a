"""Structured output: answers match their grammars whatever the model, and nothing else changes."""

import json
import sys
import threading
from dataclasses import replace

import pytest
from helpers.batching import tokens
from helpers.eager_bundle import eager_engine, eager_llm
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.grammar import Grammar
from jet_export.runtime.grammar_compile import MAX_CACHED, CompiledGrammar, GrammarCompiler
from jet_export.runtime.params import Output, Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=5 * PAGE, prefill_chunk=64)
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
END = 127  # a token that the model may take for the end of sequence


@pytest.fixture(scope="module")
def engine(device):
    return eager_engine(LIMITS, device=device)


def batching(engine, overlap: bool = False, eos: int = -1, **serving) -> BatchingEngine:
    return BatchingEngine(
        engine, ByteTokenizer(), eos, Serving(**{"prefix_cache_bytes": 0, **serving}), overlap=overlap
    )


def hot(new: int, grammar: Grammar | None, seed: int = 0, **changes) -> Params:
    return Params(new, Sampling(temperature=1.2, seed=seed), grammar=grammar, **changes)


def run(engine: BatchingEngine, *asked: tuple[list[int], Params]) -> list[RunningSequence]:
    running = [engine.submit(prompt, params, lambda _: None) for prompt, params in asked]
    finish(engine)
    return running


def finish(engine: BatchingEngine) -> None:
    for _ in range(2000):
        if not engine.step():
            assert unused(engine)
            return
    raise AssertionError("does not end")


def unused(engine: BatchingEngine) -> bool:
    s = engine.scheduler
    return s.slots.used == s.pages.used == s.window_pages.used == len(s.waiting) == len(engine.sequences) == 0


def text_of(sequence: RunningSequence) -> str:
    return bytes(sequence.tokens).decode()


names = st.text("abc", min_size=1, max_size=3)
leaves = st.one_of(
    st.just(({"type": "boolean"}, lambda x: isinstance(x, bool))),
    st.just(({"type": "null"}, lambda x: x is None)),
    st.tuples(st.integers(-50, 0), st.integers(1, 50)).map(
        lambda r: ({"type": "integer", "minimum": r[0], "maximum": r[1]}, lambda x: r[0] <= x <= r[1])
    ),
    st.integers(0, 5).map(
        lambda n: ({"type": "string", "maxLength": n, "minLength": n // 2}, lambda x: n // 2 <= len(x) <= n)
    ),
    st.lists(names | st.integers(0, 9), min_size=1, max_size=3).map(lambda v: ({"enum": v}, lambda x: x in v)),
)


def array_of(schema_and_check):
    (schema, check), n = schema_and_check
    described = {"type": "array", "items": schema, "minItems": n, "maxItems": n + 1}
    return described, lambda x: n <= len(x) <= n + 1 and all(map(check, x))


def object_of(fields):
    described = {
        "type": "object",
        "properties": {k: schema for k, (schema, _) in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }
    return described, lambda x: set(x) == set(fields) and all(check(x[k]) for k, (_, check) in fields.items())


schemas = st.recursive(
    leaves,
    lambda inner: (
        st.tuples(inner, st.integers(0, 2)).map(array_of) | st.dictionaries(names, inner, max_size=2).map(object_of)
    ),
    max_leaves=4,
)


@settings(max_examples=8, deadline=None)
@given(asked=st.lists(schemas, min_size=1, max_size=4), seed=st.integers(0, 2**16), overlap=st.booleans())
def test_answers_of_random_weights_are_valid(engine, asked, seed: int, overlap: bool) -> None:
    grammars = [Grammar.json_schema({**schema, **COMPACT}) for schema, _ in asked]
    running = run(batching(engine, overlap), *((tokens(5, i), hot(400, g, seed + i)) for i, g in enumerate(grammars)))
    for sequence, (_, check) in zip(running, asked, strict=True):
        assert sequence.finish_reason == "stop" and check(json.loads(text_of(sequence))), text_of(sequence)


KINDS = [
    (Grammar.json_object(), lambda text: isinstance(json.loads(text), dict)),
    (Grammar.regex(r"[ab]{3}(\.[0-9])?"), lambda text: len(text) in (3, 5)),
    (Grammar.choice(["red", 'a "b"\n', "green"]), lambda text: text in ("red", 'a "b"\n', "green")),
    (Grammar.lark('start: "<" item+ ">"\nitem: /[a-c]/ | "(" item ")"'), lambda text: text[0] + text[-1] == "<>"),
    (Grammar.lark('root ::= "x" digit{2}\ndigit ::= [0-9]'), lambda text: text[0] == "x" and int(text[1:]) < 100),
    (
        Grammar.tagged([("<call>", {"enum": [1, "f"]}, "</call>")]),
        lambda text: text in ("<call>1</call>", '<call>"f"</call>'),
    ),
]


@pytest.mark.parametrize("overlap", [False, True])
def test_every_kind(engine, overlap: bool) -> None:
    """Beside requests without a grammar, whose tokens and log probabilities are those they have beside other ones."""
    plain = [(tokens(9, 50 + i), replace(hot(30, None, i), logprobs=2)) for i in range(2)]
    outputs: list[list[Output]] = []
    for grammars in ([None] * len(KINDS), [grammar for grammar, _ in KINDS]):
        service = batching(engine, overlap)
        heard: list[Output] = []
        for prompt, params in plain:
            service.submit(prompt, params, heard.append)
        fixed = Grammar.regex("[a-z]{25}") if grammars[0] else None
        service.submit(tokens(4, 1), hot(25, fixed), lambda _: None)
        service.submit(tokens(4, 2), hot(25, fixed), lambda _: None)
        finish(service)
        outputs.append(heard)
    assert outputs[0] == outputs[1]
    running = run(batching(engine, overlap), *((tokens(5, i), hot(70, g, i)) for i, (g, _) in enumerate(KINDS)))
    for sequence, (grammar, check) in zip(running, KINDS, strict=True):
        complete = sequence.finish_reason == "stop"
        assert (complete and check(text_of(sequence))) or (not complete and grammar.kind in ("json_schema", "lark"))
    assert sum(s.finish_reason == "stop" for s in running) >= 4


CASES = [
    (Grammar.regex("[a-z ]{30,}"), 34),
    (Grammar.json_schema({"type": "array", "items": {"type": "string", "minLength": 3}, "minItems": 20}), 40),
    (None, 28),
    (Grammar.regex("([ab]{2}c)+"), 30),
]


@pytest.fixture(scope="module")
def alone(engine) -> list[list[int]]:
    """The tokens of each of CASES by itself."""
    return [
        run(batching(engine), (tokens(PAGE - 3 * i, i), hot(new, g, i)))[0].tokens for i, (g, new) in enumerate(CASES)
    ]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("host", [1 << 26, 0], ids=["kept", "recomputed"])
def test_preempted_requests_have_the_tokens_they_have_alone(engine, alone, overlap: bool, host: int) -> None:
    small = batching(engine, overlap, kv_tokens=5 * PAGE, host_cache_bytes=host)
    among = run(small, *((tokens(PAGE - 3 * i, i), hot(new, g, i)) for i, (g, new) in enumerate(CASES)))
    assert small.metrics.memory.preemptions > 0
    assert [s.tokens for s in among] == alone and {s.finish_reason for s in among} == {"length"}


def test_forks_and_sessions_have_matchers_of_their_own(engine) -> None:
    service, params = batching(engine, prefix_cache_bytes=1 << 26), hot(40, Grammar.regex("[a-f]{4,8}"), n=3)
    prompt = tokens(70, 3)
    leader = service.submit(prompt, params, lambda _: None)
    forks = [leader, *(service.submit(prompt, params, lambda _: None, leader=leader, choice=i) for i in (1, 2))]
    while service.step():
        pass
    apart = [service.submit(prompt, params, lambda _: None, choice=i) for i in range(3)]
    while service.step():
        pass
    assert [s.tokens for s in forks] == [s.tokens for s in apart] and len({text_of(s) for s in forks}) > 1
    first = service.submit(prompt, params, lambda _: None, keep="end")
    while service.step():
        pass
    second = service.submit([], params, lambda _: None, start=first.snapshot)  # a new answer, a new matcher
    while service.step():
        pass
    assert first.tokens == apart[0].tokens and 4 <= len(second.tokens) <= 8
    assert all(97 <= t <= 102 for s in (*forks, first, second) for t in s.tokens)


@pytest.mark.parametrize("overlap", [False, True])
def test_where_an_answer_ends(engine, overlap: bool) -> None:
    service = batching(engine, overlap, eos=END)

    def ask(grammar: Grammar, new: int = 8, **changes) -> tuple[list[int], str | None]:
        (s,) = run(service, (tokens(5, 1), Params(new, grammar=grammar, **changes)))
        return s.tokens, s.finish_reason

    a, likely = ord("a"), ((END, 100.0),)
    assert ask(Grammar.regex("a{3}")) == ([a] * 3, "stop")
    assert ask(Grammar.regex("a{3}"), 3) == ([a] * 3, "stop")  # complete at the limit
    assert ask(Grammar.regex("a{3}"), 2) == ([a] * 2, "length")
    assert ask(Grammar.regex("a{3}"), min_tokens=5) == ([a] * 3, "stop")
    assert ask(Grammar.regex("a{3,}"), logit_bias=likely) == ([a, a, a, END], "stop")  # and no earlier
    assert ask(Grammar.regex("a{3,}"), logit_bias=likely, min_tokens=5) == ([a] * 5 + [END], "stop")
    assert ask(Grammar.regex("a{3,}"), logit_bias=likely, ignore_eos=True) == ([a] * 8, "length")
    assert ask(Grammar.regex("a{3,}"), stop=("aaaa",)) == ([a] * 4, "stop")
    assert ask(Grammar.regex("a{3,}"), stop_ids=(a,)) == ([a], "stop")


def test_text_and_log_probabilities_go_on(engine) -> None:
    heard: list[Output] = []
    service = batching(engine)
    service.submit(tokens(5, 1), Params(9, grammar=Grammar.choice(["hello"]), logprobs=1, stop=("lox",)), heard.append)
    finish(service)
    assert "".join(o.text for o in heard) == "hello"  # what the stop string held back comes with the end
    assert [o.token for o in heard] == [*b"hello", None] and heard[-1].finish_reason == "stop"
    assert all(o.logprob is not None and o.logprob.chosen < 0 for o in heard[:-1])


AMBIGUOUS = Grammar.lark("start: s\ns: s s s | s s | /[a-z]/")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_that_needs_too_much_ends_its_request_alone(engine, monkeypatch, overlap: bool) -> None:
    monkeypatch.setattr("jet_export.runtime.grammar_compile.MAX_ROW_ITEMS", 40)
    service = batching(engine, overlap)
    good, bad, plain = run(
        service,
        (tokens(5, 1), hot(30, Grammar.regex("[a-z]{30}"))),
        (tokens(5, 2), hot(30, AMBIGUOUS)),
        (tokens(5, 3), hot(30, None)),
    )
    assert bad.finish_reason == "error" and "max is 40" in str(service.failure)
    assert len(good.tokens) == len(plain.tokens) == 30 and good.finish_reason == "stop"


def chain(rules: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(rules)) + f'r{rules}: "z"'


def properties(n: int) -> dict:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(n)}}


REFUSED = [
    (lambda: Grammar.json_schema({"type": "foo"}), "The JSON schema cannot be used: Invalid type: foo"),
    (lambda: Grammar.json_schema({"not": {}}), "Unimplemented keys"),
    (lambda: Grammar.json_schema({"$ref": "http://localhost/x"}), "http://localhost/x"),
    (lambda: Grammar.json_schema("{"), "The JSON schema is no JSON"),
    (lambda: Grammar.json_schema("3"), "is an object, true or false"),
    (lambda: Grammar.json_schema({"a": {1, 2}}), "no JSON"),
    (lambda: Grammar.json_schema({"description": "x" * (1 << 20)}), "longer than 1048576 bytes"),
    (lambda: Grammar.json_schema('{"items":' * 9000 + "{}" + "}" * 9000), "JSON"),
    (lambda: Grammar.json_schema(properties(800)), "max is 2000"),
    (lambda: Grammar.json_schema({"$ref": "#"}), "accepts no text"),
    (lambda: Grammar.regex("(a"), "unclosed group"),
    (lambda: Grammar.regex("(?!a)b"), "look-around"),
    (lambda: Grammar.regex("(" * 20000 + ")" * 20000), "cannot be used"),
    (lambda: Grammar.regex(""), "accepts no text"),
    (lambda: Grammar.regex("é"), "accepts no text"),  # of a vocabulary of 128 bytes
    (lambda: Grammar.lark("start: foo"), 'unknown name: "foo"'),
    (lambda: Grammar.lark("sta"), "neither Lark with a rule `start` nor GBNF: Expected ::="),
    (lambda: Grammar.lark("root ::= " + "(" * 5000), "neither Lark"),
    (lambda: Grammar.lark("root ::= " + '"a" | ' * 8000 + '"b"'), "longer than 32768 characters"),
    (lambda: Grammar.lark("start: start"), "accepts no text"),
    (lambda: Grammar.lark("start: " + "(" * 5000 + '"a"' + ")" * 5000), "too deeply nested"),
    (lambda: Grammar.lark(chain(30000)), "longer than 262144 bytes"),
    (lambda: Grammar.choice([]), "0 texts"),
    (lambda: Grammar.choice(["x"] * 5000), "5000 texts"),
    (lambda: Grammar("yaml", "x"), "'yaml' is no kind of grammar"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_refused(compiler, make, message: str) -> None:
    with pytest.raises(JetExportError) as refusal:
        compiler.compile(make())
    assert message in str(refusal.value) and len(str(refusal.value)) < 600
    assert not compiler._compiling


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ByteTokenizer(), 128, ())


def test_large_grammars_that_are_no_trouble(compiler) -> None:
    references = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(9000)}
    for grammar in (
        Grammar.lark(chain(8000)),  # overflows the stack of an ordinary thread
        Grammar.json_schema({"$ref": "#/$defs/d0", "$defs": {**references, "d9000": {"type": "string"}}}),
        Grammar.json_schema({"enum": [f"value {i}" for i in range(20000)]}),
        Grammar.choice([f"value {i}" for i in range(4096)]),
        Grammar.regex("((a{1,1000}){1,1000}){1,1000}"),
    ):
        assert compiler.compile(grammar).matcher().compute_bitmask()


def test_a_grammar_is_compiled_once_and_few_are_kept(monkeypatch) -> None:
    compiler, compiled = GrammarCompiler(ByteTokenizer(), 128, ()), list[Grammar]()
    plain = compiler._compile

    def counted(grammar: Grammar) -> CompiledGrammar:
        compiled.append(grammar)
        return plain(grammar)

    monkeypatch.setattr(compiler, "_compile", counted)
    grammar = Grammar.json_schema({"type": "string"})
    callers = [threading.Thread(target=compiler.compile, args=(grammar,)) for _ in range(8)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert compiled == [Grammar.json_schema('{ "type": "string" }')]
    for i in range(MAX_CACHED + 3):
        compiler.compile(Grammar.regex(f"a{{{i + 1}}}"))
    assert len(compiler._cached) == MAX_CACHED and grammar not in compiler._cached


def test_without_llguidance(engine, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    service = batching(engine)
    service.grammars.warm_up()
    with pytest.raises(JetExportError, match=r"needs llguidance.\n.*pip install 'jet-export\[structured\]'"):
        service.submit([1], Params(5, grammar=Grammar.json_object()), lambda _: None)
    assert run(service, ([1], Params(2)))[0].finish_reason == "length"


def test_cancelling_inside_a_grammar_frees_all(engine) -> None:
    for overlap in (False, True):
        service = batching(engine, overlap)
        asked = [service.submit(tokens(5, i), hot(300, Grammar.regex("a*")), lambda _: None) for i in range(6)]
        for _ in range(5):
            service.step()
        for sequence in asked:
            service.cancel(sequence)
        finish(service)
        assert all(s.matcher is None and s.finish_reason == "cancelled" for s in asked)


def test_generate() -> None:
    (answer,) = eager_llm(LIMITS).generate("abc", 20, grammar=Grammar.choice(["yes", "no"]))
    assert answer.text in ("yes", "no") and answer.finish_reason == "stop"
