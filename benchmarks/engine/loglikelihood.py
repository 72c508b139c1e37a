"""Loglikelihood beside prefill: tokens per second of long documents, with and without their tokens' log probabilities.

    python benchmarks/engine/loglikelihood.py BUNDLE [--length 4096] [--documents 32] [--repeats 5] [--output FILE]

Random tokens, the same documents in every variant, which run in turns in one process, each through continuous batching
(runtime/batching.py) with one new token a document; medians of --repeats, after one round to compile and warm up:

    prefill         no log probabilities
    loglikelihood   of every token, and of the most likely one, as `jet-export eval` and lm-evaluation-harness ask
    eval            the same by `jet-export eval`'s model, to a sum for each document (needs lm_eval)
    call            one engine call after another on the bare runner: "prefill" with the logits of a call's last tokens,
                    "all logits" with those of all, "kernel" the log probabilities of those logits

First the log probabilities of one document are compared with a log_softmax in fp32 of the engine's own logits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from jet_export.runtime.llm import LLM
from jet_export.runtime.logprobs import token_logprobs
from jet_export.runtime.params import Output, Params
from jet_export.runtime.scoring import call_tokens
from jet_export.utils.environment import write_result

TOLERANCE = 2e-2  # nats: a chunk's logits in 16 bits depend on the sizes of the calls


def run(llm: LLM, documents: list[list[int]], params: Params) -> list[Output]:
    """The first output of each."""
    found: dict[int, Output] = {}

    def take(i: int) -> Callable[[Output], None]:
        return lambda output: found.__setitem__(i, output)

    for i, document in enumerate(documents):
        llm.batching.submit(document, params, take(i), text=False)
    while llm.batching.step():
        pass
    return [found[i] for i in range(len(documents))]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def check(llm: LLM, document: list[int]) -> float:
    """Mean difference of log probabilities, nats. Raises SystemExit where it is too large."""
    runner, chunk = llm.runner, llm.engine.limits.prefill_chunk
    (output,) = run(llm, [document], Params(1, prompt_logprobs=1, ignore_eos=True))
    found = torch.tensor([p.chosen for p in output.prompt_logprobs])
    expected = []
    _open_slot(llm, len(document))
    for at in range(0, len(document), chunk):
        logits = runner.prefill([0], [document[at : at + chunk]], all_logits=True)
        for first in range(0, len(logits), 256):
            rows = logits[first : first + 256].float().log_softmax(-1).cpu()
            targets = document[at + first + 1 : at + first + 1 + len(rows)]
            expected.append(rows[: len(targets)].gather(1, torch.tensor(targets)[:, None])[:, 0])
    difference = float((found - torch.cat(expected)).abs().mean())
    if not difference < TOLERANCE:
        raise SystemExit(f"The log probabilities differ from log_softmax by {difference:.3g} nats on average.")
    return difference


def _open_slot(llm: LLM, length: int) -> None:
    """Slot 0 with pages for so many tokens; nothing else runs."""
    table = llm.runner.block_table.shape[1]
    llm.runner.assign(0, list(range(table)), list(range(llm.runner.window_block_table.shape[1])))


@torch.inference_mode()
def one_call(llm: LLM, repeats: int) -> dict[str, float]:
    """Median milliseconds of a call of one sequence, of as many tokens as a scored call has."""
    runner, n = llm.runner, call_tokens(llm.runner)
    tokens = torch.randint(0, llm.engine.config.vocab_size, (n,)).tolist()
    targets = torch.tensor(tokens, device=llm.engine.device)
    _open_slot(llm, n)

    def prefill(all_logits: bool) -> torch.Tensor:
        runner.reset(0)
        return runner.prefill([0], [tokens], all_logits=all_logits)

    logits = prefill(True).clone()
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: prefill(False),
        "all logits": lambda: prefill(True),
        "kernel": lambda: token_logprobs(logits, targets),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name, call in calls.items():
            elapsed = seconds(call, llm.engine.device)
            if i >= 2:
                times[name].append(1e3 * elapsed)
    return {"tokens": n, **{f"{name} ms": round(statistics.median(t), 4) for name, t in times.items()}}


def variants(llm: LLM, documents: list[list[int]]) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        "prefill": lambda: run(llm, documents, Params(1, ignore_eos=True)),
        "loglikelihood": lambda: run(llm, documents, Params(1, prompt_logprobs=1, ignore_eos=True)),
    }
    if find_spec("lm_eval"):
        from jet_export.evaluation.model import EngineLM

        model = EngineLM(llm, 0)
        found["eval"] = lambda: model.score([(None, d[:1], d[1:]) for d in documents], "loglikelihood")
    return found


def measure(llm: LLM, length: int, count: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, length)
    documents: list[list[int]] = torch.randint(0, llm.engine.config.vocab_size, shape, generator=generator).tolist()
    difference = check(llm, documents[0])
    calls = variants(llm, documents)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            elapsed = seconds(call, llm.engine.device)
            if i:
                times[name].append(elapsed)
    rates = {name: round(count * length / statistics.median(t), 1) for name, t in times.items()}
    return {
        "mean difference to log_softmax, nats": difference,
        "tokens per second": rates,
        "seconds": {name: [round(x, 4) for x in t] for name, t in times.items()},
        "share of prefill speed": {name: round(r / rates["prefill"], 4) for name, r in rates.items()},
        "call": one_call(llm, max(repeats, 5)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    llm = LLM(args.bundle)
    limits = llm.engine.limits
    if args.length >= limits.max_seq_len:
        raise SystemExit(
            f"--length {args.length}: the bundle's max_seq_len is {limits.max_seq_len}; build a longer one."
        )
    result = measure(llm, args.length, args.documents, args.repeats)
    for name, rate in result["tokens per second"].items():
        print(f"{name:14} {rate:12.1f} tokens/s  {result['share of prefill speed'][name]:6.1%} of prefill")
    print(f"call           {result['call']}")
    if args.output:
        model = {
            "model": llm.manifest.model["name"],
            "dtype": llm.manifest.dtype,
            "fp8": bool(llm.manifest.fp8_layers),
            "backend": llm.manifest.backend["name"],
            "vocab_size": llm.engine.config.vocab_size,
            "max_batch_size": limits.max_batch_size,
            "prefill_chunk": limits.prefill_chunk,
        }
        write_result(args.output, {**model, "length": args.length, "documents": args.documents, **result})


if __name__ == "__main__":
    main()
