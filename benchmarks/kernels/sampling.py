"""Sampling on this GPU: kernels/sampling.py beside plain torch that does all rows at once, and beside argmax.

    python benchmarks/kernels/sampling.py [--batches 1,64,256] [--vocab 151936] [--output FILE]

Correctness first: the tokens of a mix of rows are the specification's. Logits are random and bf16, like those of random
weights: the filters' worst case, since nearly every token is likely. `peaked` scales them so that few tokens hold the
mass, as those of trained models do. Times are medians over CUDA graphs, in microseconds a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arguments import lacks_gpu, output_of, parser_of
from torch import Tensor

from jet_export.bench import timer
from jet_export.kernels.sampling_ref import RowSettings, sample_ref
from jet_export.runtime.sampler import SlotSampler
from jet_export.utils.environment import write_result

SETTINGS = {
    "greedy": RowSettings(),
    "temperature 1": RowSettings(temperature=1.0),
    "t 0.8 top_p 0.95": RowSettings(temperature=0.8, top_p=0.95),
    "t 0.8 top_k 50": RowSettings(temperature=0.8, top_k=50),
    "t 0.8 top_k 50 top_p 0.95": RowSettings(temperature=0.8, top_k=50, top_p=0.95),
    "t 0.8 min_p 0.05": RowSettings(temperature=0.8, min_p=0.05),
    "repetition 1.1": RowSettings(repetition_penalty=1.1),
}


def sampler_of(row: RowSettings, batch: int, vocab: int) -> tuple[SlotSampler, Tensor]:
    """Every slot with these settings and a seed of its own; the slots."""
    sampling = SlotSampler(batch, vocab, torch.device("cuda"))
    for i in range(batch):
        sampling.begin(i, RowSettings(**{**row.__dict__, "seed": i}), list(range(100 * i, 100 * i + 100)), [])
    return sampling, torch.arange(batch, dtype=torch.int32, device="cuda")


def check(vocab: int) -> int:
    """How many tokens of a mix of rows differ from the specification's; rounding may decide one in a great many."""
    rows = list(SETTINGS.values()) * 4
    sampling = SlotSampler(len(rows), vocab, torch.device("cuda"))
    rows = [RowSettings(**{**row.__dict__, "seed": i}) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        sampling.begin(i, row, [i, i + 1], [])
    logits = (2 * torch.randn(len(rows), vocab, device="cuda")).bfloat16()
    tokens = sampling.sample(logits, torch.arange(len(rows), dtype=torch.int32, device="cuda"))[0].tolist()
    exact = logits.double().cpu().numpy()
    return sum(
        t != sample_ref(x, row, [i, i + 1], []) for i, (t, x, row) in enumerate(zip(tokens, exact, rows, strict=True))
    )


def plain_torch(row: RowSettings, logits: Tensor) -> Tensor:
    """All rows at once by torch's own operations."""
    if row.temperature == 0:
        return logits.argmax(-1)
    x = logits.float() / row.temperature
    if row.top_k:
        x = x.masked_fill(x < x.topk(row.top_k, dim=-1).values[:, -1:], -torch.inf)
    p = x.softmax(-1)
    if row.top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= row.top_p, 0.0)
        p = torch.zeros_like(p).scatter_(-1, order, ranked)
    if row.min_p:
        p = p.masked_fill(p < row.min_p * p.max(-1, keepdim=True).values, 0.0)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def measure(batch: int, vocab: int, scale: float) -> dict[str, dict[str, float]]:
    logits = (scale * torch.randn(batch, vocab, device="cuda")).bfloat16()
    out = {}
    for name, row in SETTINGS.items():
        sampling, slots = sampler_of(row, batch, vocab)
        variants: dict[str, Callable[[], Any]] = {"kernels": partial(sampling.sample, logits, slots)}
        if row.repetition_penalty == 1:
            variants["torch"] = partial(plain_torch, row, logits)
        times = timer.compare(variants, graph=True, repeats=10)
        out[name] = {variant: round(1e3 * t.median, 1) for variant, t in times.items()}
    times = timer.compare({"topk": lambda: logits.float().topk(5)}, graph=True, repeats=10)
    out["5 logprobs"] = {"torch": round(1e3 * times["topk"].median, 1)}
    return out


def main() -> None:
    parser = parser_of(__doc__, "sampling")
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--vocab", type=int, default=151_936)
    options = parser.parse_args()
    if lacks_gpu("sampling.py"):
        raise SystemExit(2)
    wrong = check(options.vocab)
    print(f"{wrong} of 28 tokens differ from the specification's")
    if wrong > 1:
        raise SystemExit("the kernels are wrong: nothing is timed")
    cases: list[dict[str, Any]] = []
    for shape, scale in (("flat", 1.0), ("peaked", 6.0)):
        for batch in map(int, options.batches.split(",")):
            times = measure(batch, options.vocab, scale)
            cases.append({"batch": batch, "logits": shape, "microseconds": times})
            for name, row in times.items():
                print(
                    f"{shape:7} B{batch:<4} {name:26}", "  ".join(f"{k} {v:8.1f}" for k, v in row.items()), flush=True
                )
    output = output_of(options)
    write_result(output, {"vocab": options.vocab, "wrong_tokens": wrong, "cases": cases})


if __name__ == "__main__":
    main()
