"""The published checkpoint end to end: download, FP8 engine, verification against PyTorch, a chat-formatted answer.

    python examples/published_checkpoint.py                            # jet-2b, on the GPU that is here
    python examples/published_checkpoint.py --model jet-4b --output bundles/jet-4b
    python examples/published_checkpoint.py --checkpoint DIR           # where there is no network

The same by the command line: `jet-export build --model jet-2b --fp8`, `jet-export verify`, `jet-export generate`. To
compare with the published code too and to measure, there is `jet-export try jet-2b`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jet_export
from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.server.openai.chat import load_chat_template
from jet_export.verify.verify import verify_bundle


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="jet-2b")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path("bundles/published"))
    parser.add_argument("--question", default="Why is linear attention fast?")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int)
    given = parser.parse_args(arguments)

    options = BuildOptions(
        model=given.model,
        checkpoint=given.checkpoint,
        fp8=True,
        max_batch_size=given.max_batch_size,
        max_seq_len=given.max_seq_len,
        output=given.output,
    )
    bundle = run_build(make_plan(options), ["python", *sys.argv], print)
    verification = verify_bundle(bundle, None, 0, print)
    if not verification.passed:
        raise SystemExit("\n".join(verification.failures()))
    print(f"verified in {verification.seconds:.0f} s")

    llm = jet_export.LLM(bundle)
    template = load_chat_template(bundle)
    if template is None:  # a base model
        prompt = llm.tokenizer.encode(given.question)
    else:
        text = template([{"role": "user", "content": given.question}], True)
        prompt = llm.tokenizer.encode(text, special_tokens=False)  # the template brings its own
        llm.eos = (*llm.eos, *template.turn_ends(llm.tokenizer))
    print(llm.generate([prompt], given.max_tokens)[0].text)


if __name__ == "__main__":
    main()
