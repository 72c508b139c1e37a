"""The serving protocol: requests that arrive together, under continuous batching.

The engine runs in this process, without HTTP: a closed burst, not a rate of arrivals.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from jet_export.backends.base import Engine
from jet_export.bench.timer import percentile
from jet_export.model.cache import PAGE, cdiv
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output, Params
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer
from jet_export.utils.errors import JetExportError

ROUNDS = 4  # requests per slot


@dataclass(frozen=True, kw_only=True)
class ServingRow:
    """Times in milliseconds; tokens/s of all requests together, from the first arrival to the last token."""

    context: int
    new_tokens: int
    slots: int
    requests: int
    tokens_per_s: float
    total_tokens_per_s: float  # with prompt tokens
    ttft_p50: float
    ttft_p99: float
    ms_per_token_p50: float  # of each request, after its first token
    ms_per_token_p99: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int | None
    mixed_prefill: int | None  # as asked for

    @property
    def sampling(self) -> str:
        """As a table has it: what is not at its default."""
        words = [f"t {self.temperature:g}" if self.temperature else "greedy"]
        if self.temperature:
            words += [f"top_k {self.top_k}"] if self.top_k else []
            words += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
            words += [f"min_p {self.min_p:g}"] if self.min_p else []
        words += [f"repetition {self.repetition_penalty:g}"] if self.repetition_penalty != 1 else []
        words += [f"presence {self.presence_penalty:g}"] if self.presence_penalty else []
        words += [f"frequency {self.frequency_penalty:g}"] if self.frequency_penalty else []
        words += [f"{self.logprobs} logprobs"] if self.logprobs is not None else []
        return " ".join(words)


class _TokenTimes:
    """The arrival times of one request's tokens."""

    def __init__(self, begin: float) -> None:
        self.begin, self.times, self.reason = begin, list[float](), ""

    def __call__(self, output: Output) -> None:
        if output.token is not None:
            self.times.append(time.perf_counter())
        self.reason = output.finish_reason or self.reason


def serve_burst(
    engine: Engine,
    tokenizer: Tokenizer | ByteTokenizer,
    *,
    context: int,
    new_tokens: int,
    slots: int,
    params: Params | None = None,
    mixed_prefill: int | None = None,
    seed: int = 0,
) -> ServingRow:
    """ROUNDS requests per slot, random prompts of `context` tokens, each with a sampling seed of its own, without a
    prefix cache. `params`: how the requests are sampled, by default greedily.

    Raises JetExportError if one does not finish.
    """
    requests = ROUNDS * slots
    pages = slots * cdiv(context + new_tokens, PAGE)  # not max_seq_len for every slot
    serving = Serving(
        slots=slots,
        kv_tokens=pages * PAGE,
        mixed_prefill=mixed_prefill,
        prefix_cache_bytes=0,
        max_waiting=requests,
        wait_timeout=1e9,
    )
    batching = BatchingEngine(engine, tokenizer, -1, serving)
    rng = torch.Generator().manual_seed(seed)
    prompts = torch.randint(engine.config.vocab_size, (requests + slots, context), generator=rng).tolist()
    params = replace(params or Params(), max_new_tokens=new_tokens, ignore_eos=True)
    sampling = params.sampling
    seeded = [replace(params, sampling=replace(sampling, seed=i)) for i in range(requests)]
    _run(batching, prompts[requests:], [replace(params, max_new_tokens=2)] * slots)  # warm-up
    clocks = _run(batching, prompts[:requests], seeded)
    bad = next((c.reason for c in clocks if c.reason != "length"), None)
    if bad:
        raise JetExportError(f"serving: a request ended with {bad!r} before its last token.")
    seconds = max(c.times[-1] for c in clocks) - min(c.begin for c in clocks)
    ttft = [1e3 * (c.times[0] - c.begin) for c in clocks]
    per_token = [1e3 * (c.times[-1] - c.times[0]) / (len(c.times) - 1) for c in clocks]
    return ServingRow(
        context=context,
        new_tokens=new_tokens,
        slots=slots,
        requests=requests,
        tokens_per_s=requests * new_tokens / seconds,
        total_tokens_per_s=requests * (context + new_tokens) / seconds,
        ttft_p50=statistics.median(ttft),
        ttft_p99=percentile(ttft, 0.99),
        ms_per_token_p50=statistics.median(per_token),
        ms_per_token_p99=percentile(per_token, 0.99),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logprobs=params.logprobs,
        mixed_prefill=mixed_prefill,
    )


def _run(batching: BatchingEngine, prompts: Sequence[list[int]], params: Sequence[Params]) -> list[_TokenTimes]:
    clocks = []
    for prompt, p in zip(prompts, params, strict=True):
        clocks.append(_TokenTimes(time.perf_counter()))
        batching.submit(prompt, p, clocks[-1])
    while batching.step():
        pass
    return clocks
