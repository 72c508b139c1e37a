"""Offline batch: completions of many prompts, one JSON a line, as fast as the engine takes them.

    jet-export build --model jet-tiny --fp8
    python examples/offline_batch.py bundles/jet-tiny-fp8-inductor prompts.txt > answers.jsonl

All prompts are handed over at once: continuous batching keeps the engine's slots full, whatever their lengths.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import jet_export


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("prompts", type=Path, help="a prompt a line")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args(arguments)

    prompts = [line for line in given.prompts.read_text(encoding="utf-8").splitlines() if line]
    llm = jet_export.LLM(given.bundle)
    begin = time.monotonic()
    answers = llm.generate(prompts, given.max_tokens, temperature=given.temperature)
    seconds = time.monotonic() - begin
    for prompt, answer in zip(prompts, answers, strict=True):
        print(json.dumps({"prompt": prompt, "text": answer.text, "finish_reason": answer.finish_reason}))
    tokens = sum(len(answer.token_ids) for answer in answers)
    print(f"{len(prompts)} prompts, {tokens} tokens, {tokens / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
