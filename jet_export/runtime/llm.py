"""`LLM(bundle).generate(...)`: text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jet_export.errors import JetExportError
from jet_export.runtime.engine import load_engine
from jet_export.runtime.runner import MAX_PREFILL_TOKENS, Runner
from jet_export.runtime.sampling import Sampler, Sampling
from jet_export.runtime.tokenizer import load_tokenizer

OnToken = Callable[[int, int], None]  # (index of the prompt, token)


@dataclass
class Completion:
    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" (end-of-sequence token) or "length"
    logits: Tensor | None = None  # [len(token_ids), vocab], where asked for; on the CPU


class LLM:
    """A bundle, loaded: its engine, its pools and its tokenizer.

    Raises JetExportError where the bundle is damaged or made for another machine.
    """

    def __init__(self, bundle: str | Path, cuda_graphs: bool = True, check: bool = True) -> None:
        self.engine, self.manifest = load_engine(bundle, check)
        self.tokenizer = load_tokenizer(bundle)
        self.runner = Runner(self.engine, cuda_graphs)
        self.eos = self.manifest.config.eos_token_id

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        return_logits: bool = False,
        ignore_eos: bool = False,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids) by at most `max_new_tokens`.

        Greedy by default; `temperature` > 0 samples with `seed`. `on_token(i, token)` sees each token as it is made.
        Raises JetExportError for an empty prompt, ids outside the vocabulary, and a prompt that leaves no room.
        """
        listed: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        rows = [self._encode(p, i, max_new_tokens) for i, p in enumerate(listed)]
        sampler = Sampler(Sampling(temperature, top_k, top_p, seed), self.engine.device)
        out: list[Completion] = []
        n = self.engine.limits.max_batch_size
        for start in range(0, len(rows), n):
            group = _Group(self, rows[start : start + n], start, sampler, max_new_tokens, return_logits, ignore_eos)
            out += group.run(on_token)
        return out

    def _encode(self, prompt: str | Sequence[int], i: int, max_new_tokens: int) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        if max_new_tokens < 1:
            raise JetExportError(f"max_new_tokens is {max_new_tokens}.", "Ask for at least 1.")
        if not ids:
            raise JetExportError(f"prompt {i} is empty.", "Give at least one token.")
        bad = [t for t in ids if not 0 <= t < self.engine.config.vocab_size]
        if bad:
            raise JetExportError(f"prompt {i}: token {bad[0]} is not below vocab_size {self.engine.config.vocab_size}.")
        limit = self.engine.limits.max_seq_len
        if len(ids) + max_new_tokens > limit:
            raise JetExportError(
                f"prompt {i}: {len(ids)} tokens and {max_new_tokens} new ones exceed the bundle's max_seq_len {limit}.",
                "Shorten the prompt, ask for fewer tokens, or build with a larger --max-seq-len.",
            )
        return ids


class _Group:
    """Prompts that run together, one slot each, until all have finished."""

    def __init__(
        self, llm: LLM, rows: list[list[int]], first: int, sampler: Sampler, limit: int, keep: bool, ignore_eos: bool
    ) -> None:
        self.llm, self.rows, self.first, self.sampler = llm, rows, first, sampler
        self.limit, self.keep_logits, self.ignore_eos = limit, keep, ignore_eos
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.logits: list[list[Tensor]] = [[] for _ in rows]
        self.reason = ["length"] * len(rows)

    def run(self, on_token: OnToken | None) -> list[Completion]:
        active = list(range(len(self.rows)))
        logits = self._prefill()
        while True:
            chosen = self.sampler(logits)
            keep = self._record(active, chosen.tolist(), logits, on_token)
            if not keep:
                break
            if len(keep) < len(active):
                chosen = chosen[torch.tensor(keep, device=chosen.device)]
                active = [active[j] for j in keep]
            logits = self.llm.runner.decode(active, chosen)
        decode = self.llm.tokenizer.decode
        return [
            Completion(decode(t), t, r, torch.stack(x) if x else None)
            for t, r, x in zip(self.tokens, self.reason, self.logits, strict=True)
        ]

    def _record(self, active: list[int], chosen: list[int], logits: Tensor, on_token: OnToken | None) -> list[int]:
        """Append this step's tokens; returns the positions in `active` that go on."""
        kept_logits = logits.float().cpu() if self.keep_logits else None
        keep = []
        for j, (i, token) in enumerate(zip(active, chosen, strict=True)):
            self.tokens[i].append(token)
            if kept_logits is not None:
                self.logits[i].append(kept_logits[j])
            if on_token:
                on_token(self.first + i, token)
            if token == self.llm.eos and not self.ignore_eos:
                self.reason[i] = "stop"
            elif len(self.tokens[i]) < self.limit:
                keep.append(j)
        return keep

    def _prefill(self) -> Tensor:
        """Every prompt in chunks; returns the logits of each prompt's last token [n, vocab]."""
        runner, chunk = self.llm.runner, self.llm.engine.limits.prefill_chunk
        last: list[Tensor | None] = [None] * len(self.rows)
        for slot in range(len(self.rows)):
            runner.reset(slot)
        done = [0] * len(self.rows)
        while any(x is None for x in last):
            slots: list[int] = []
            budget = MAX_PREFILL_TOKENS
            for i, row in enumerate(self.rows):
                n = min(chunk, len(row) - done[i])
                if n and (n <= budget or not slots):
                    slots.append(i)
                    budget -= n
            parts = [self.rows[i][done[i] : done[i] + chunk] for i in slots]
            logits = runner.prefill(slots, parts)
            for j, i in enumerate(slots):
                done[i] += len(parts[j])
                if done[i] == len(self.rows[i]):
                    last[i] = logits[j]
        return torch.stack([x for x in last if x is not None])
