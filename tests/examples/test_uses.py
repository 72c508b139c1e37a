"""The examples of each use run, and do what they say."""

import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from helpers.bundles import tiny_bundle  # noqa: E402
from helpers.eager_bundle import eager_llm  # noqa: E402
from helpers.fake_executor import prepared, searched  # noqa: E402
from helpers.paths import EXAMPLES  # noqa: E402
from helpers.scripts import load_file  # noqa: E402
from helpers.serving import LIMITS, async_llm, server  # noqa: E402

import jet_export  # noqa: E402
from jet_export.search.points import all_points  # noqa: E402


def example(name: str) -> ModuleType:
    return load_file(EXAMPLES / f"{name}.py")


@pytest.fixture
def bundle(monkeypatch) -> str:
    """LLM(this) is an eager engine."""
    monkeypatch.setattr(jet_export, "LLM", lambda path: eager_llm(LIMITS))
    return "bundles/mini"


@pytest.fixture(scope="module")
def url():
    with server(async_llm()) as address:
        yield f"{address}/v1"


def test_offline_batch(bundle, tmp_path, capsys) -> None:
    prompts = [f"prompt {i}" for i in range(9)]  # more than there are slots
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    example("offline_batch").main([bundle, str(tmp_path / "prompts.txt"), "--max-tokens", "6"])
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    expected = eager_llm(LIMITS).generate(prompts, 6)
    assert [(a["prompt"], a["text"]) for a in answers] == [(p, c.text) for p, c in zip(prompts, expected, strict=True)]
    assert said.err.startswith("9 prompts, 54 tokens")


def test_streaming_chat(url, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nmore\n\nnever said\n"))
    example("streaming_chat").main(["--url", url, "--max-tokens", "8", "--temperature", "0"])
    llm = eager_llm(LIMITS)
    first = llm.generate("<user>hi\n<assistant>", 8)[0].text
    second = llm.generate(f"<user>hi\n<assistant>{first}\n<user>more\n<assistant>", 8)[0].text
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_forked_sessions(bundle, tmp_path, capsys) -> None:
    (tmp_path / "d.txt").write_text("A document.")
    main = example("forked_sessions").main
    saved = str(tmp_path / "d.session")
    document = ["--document", str(tmp_path / "d.txt"), "--save", saved]
    main([bundle, "Who?", "When?", *document, "--max-tokens", "6"])
    answers = capsys.readouterr().out
    llm = eager_llm(LIMITS)
    expected = [llm.generate(f"A document.\n\nQuestion: {q}\nAnswer:", 6)[0].text for q in ("Who?", "When?")]
    assert answers == f"--- Who?\n{expected[0]}\n--- When?\n{expected[1]}\n"
    main([bundle, "Who?", "When?", "--load", saved, "--max-tokens", "6"])
    assert capsys.readouterr().out == answers


def test_json_schema(url, monkeypatch, capsys) -> None:
    pytest.importorskip("llguidance")
    module = example("json_schema")
    exact = {"whitespace_flexible": False}  # bytes below 32 are no text for the tokenizer of these tests
    monkeypatch.setattr(module, "BOOK", {**module.BOOK, "x-guidance": exact})
    for seed in ("1", "2"):
        module.main(["A book:", "--url", url, "--seed", seed])
        book = json.loads(capsys.readouterr().out)
        assert set(book) == {"title", "year", "genre"} and isinstance(book["title"], str)
        assert 1450 <= book["year"] <= 2100 and book["genre"] in ("novel", "stories", "poems", "essays")


def test_search_score(tmp_path, capsys) -> None:
    module = example("search_score")
    search = prepared(tmp_path, scores=f"{EXAMPLES / 'search_score.py'}:score")
    searched(search)
    spec = search.spec
    best = max(all_points(spec.space, spec.preset), key=lambda p: module.score(p.config(spec.preset, spec.space), p))
    scores = {e.label: e.score for e in search.state.evaluations.values()}
    assert max(scores, key=lambda label: scores[label] or 0) == str(best.sizes[0])
    assert search.chosen is not None and "search_score.py:score, the user's" in spec.score.source
    module.main()
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_published_checkpoint(tmp_path_factory, monkeypatch, capsys) -> None:
    """On jet-tiny's bundle, which is built already. Its verification has tests of its own."""
    module = example("published_checkpoint")
    bundle = tiny_bundle(tmp_path_factory)
    verified: list[Path] = []

    def verify_bundle(path, text, seed, emit):
        from jet_export.verify.verify import Verification

        verified.append(path)
        return Verification(str(path))

    monkeypatch.setattr(module, "verify_bundle", verify_bundle)
    limits = ["--max-batch-size", "4", "--max-seq-len", "1024"]
    module.main(["--model", "jet-tiny", "--output", str(bundle), *limits, "--question", "def ", "--max-tokens", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("is up to date.") and verified == [bundle]
    assert "\n".join(lines[2:]) == jet_export.LLM(bundle).generate("def ", 8)[0].text
