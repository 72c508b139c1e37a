"""`jet-export generate`: prompts from the command line, tokens to the terminal as they are generated."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from jet_export.cli.options import Bundle, Deterministic, Draft, Drafts, Speculate, TrustedKey
from jet_export.utils.errors import JetExportError
from jet_export.utils.progress import Progress


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The same for every prompt."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool
    deterministic: bool
    speculate: str
    draft: Path | None
    drafts: int | None


def generate(
    bundle: Bundle,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - reads standard input.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="UTF-8 file with one prompt per line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps every token.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue past the end-of-sequence token.")] = False,
    deterministic: Deterministic = False,
    trusted_key: TrustedKey = None,
    speculate: Speculate = "off",
    draft: Draft = None,
    drafts: Drafts = None,
) -> None:
    """Generate text with a bundle."""
    options = GenerateOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        ignore_eos=ignore_eos,
        deterministic=deterministic,
        speculate=speculate,
        draft=draft,
        drafts=drafts,
    )
    stream(bundle, read_prompts(prompt, prompts), options)


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """`--prompt TEXT`, `--prompt -` (standard input) or `--prompts FILE` (one per line). Raises JetExportError."""
    if (prompt is None) == (file is None):
        raise JetExportError(
            "generate: give --prompt TEXT (or - for standard input) or --prompts FILE, one of the two."
        )
    if prompt == "-":
        return [_utf8(sys.stdin.buffer.read(), "standard input")]
    if prompt is not None:
        return [_utf8(prompt.encode("utf-8", "surrogateescape"), "--prompt")]
    assert file is not None
    try:
        data = file.read_bytes()
    except OSError as e:
        raise JetExportError(f"--prompts {file}: {e.strerror}.") from None
    lines = _utf8(data, f"--prompts {file}").splitlines()
    if not lines:
        raise JetExportError(f"--prompts {file}: no prompt in it.")
    return lines


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise JetExportError(f"{where}: not UTF-8 (byte {e.start}).", "Convert it first, e.g. with iconv.") from None


def stream(bundle: Path, prompts: list[str], options: GenerateOptions) -> None:
    """Generate and print: one prompt streams, several are printed at the end. A summary goes to standard error."""
    from jet_export.runtime.llm import LLM
    from jet_export.runtime.tokenizer import ByteTokenizer, TextStream

    start = time.monotonic()
    with Progress(print).stage(f"load {bundle}", lines=False):
        llm = LLM(
            bundle,
            deterministic=options.deterministic,
            speculate=options.speculate,
            draft=options.draft,
            drafts=options.drafts,
        )
    loaded = time.monotonic() - start
    if isinstance(llm.tokenizer, ByteTokenizer):
        print("note: the bundle has no tokenizer: prompts are read as bytes, tokens printed as ids", file=sys.stderr)
    text = TextStream(llm.tokenizer)
    first: list[float] = []

    def on_token(i: int, token: int) -> None:
        if not first:
            first.append(time.monotonic())
            if len(prompts) == 1:
                print(prompts[0], end="", flush=True)
        if len(prompts) == 1 and (token not in llm.eos or options.ignore_eos):
            print(text.push(token), end="", flush=True)

    start = time.monotonic()
    done = llm.generate(
        prompts,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
        on_token=on_token,
    )
    end = time.monotonic()
    if len(prompts) == 1:
        print()
    else:
        for prompt, completion in zip(prompts, done, strict=True):
            print(f"{prompt}{completion.text}")
    generated = sum(len(c.token_ids) for c in done)
    decode = end - first[0]
    rate = f"{(generated - len(done)) / decode:.1f} tokens/s decoding" if generated > len(done) and decode > 0 else ""
    ttft = first[0] - start
    summary = [f"{generated} tokens", f"load {loaded:.2f} s", f"first token {ttft * 1e3:.0f} ms", rate]
    print(f"[{', '.join(x for x in summary if x)}]", file=sys.stderr)
