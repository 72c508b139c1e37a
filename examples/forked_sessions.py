"""Forked sessions: a document is read once, then every question continues from its states.

    python examples/forked_sessions.py bundles/jet-tiny-fp8-inductor --document report.txt "Who wrote it?" "When?"
    python examples/forked_sessions.py bundles/jet-tiny-fp8-inductor --document report.txt --save report.session
    python examples/forked_sessions.py bundles/jet-tiny-fp8-inductor --load report.session "Who wrote it?"

A fork copies nothing, and answers with the bits that the whole text would have given. A saved session can be loaded on
another machine with the same bundle, without reading the document again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jet_export


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("questions", nargs="*")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--document", type=Path)
    source.add_argument("--load", metavar="FILE")
    parser.add_argument("--save", metavar="FILE")
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args(arguments)

    llm = jet_export.LLM(given.bundle)
    document = llm.load_session(given.load) if given.load else llm.session(given.document.read_text(encoding="utf-8"))
    if given.save:
        llm.save_session(document, given.save)
    if given.questions:
        forks = [llm.fork(document) for _ in given.questions]  # all questions run in one batch
        prompts = [f"\n\nQuestion: {question}\nAnswer:" for question in given.questions]
        answers = llm.generate(prompts, given.max_tokens, session=forks)
        for question, answer in zip(given.questions, answers, strict=True):
            print(f"--- {question}\n{answer.text}")


if __name__ == "__main__":
    main()
