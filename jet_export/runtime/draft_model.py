"""Drafts of a second, smaller bundle, which runs beside the first with slots, pages and states of its own.

The draft model is fed the tokens that its sequences have got since its last draft, and decodes on from there. It draws
with the noise of the request at each position, as the bundle itself will: where the two distributions agree, so do the
draws. Its states as they were before it drafted are copied back before it goes on, so it may be any bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.load import load_engine
from jet_export.model.cache import pages_per_sequence
from jet_export.runtime.capacity import Serving
from jet_export.runtime.prompt_lookup import NO_MATCH, Match
from jet_export.runtime.runner import PoolSize, Runner
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from jet_export.utils.errors import JetExportError

Draw = Callable[[Tensor, list[int], list[int]], Tensor]  # (logits [n, vocab], slots, how far ahead) -> tokens [n]


class DraftModel:
    """A Proposer. Slot i of the batch has slot i here."""

    guesses = False

    def __init__(self, engine: Engine, slots: int, *, cuda_graphs: bool = True, deterministic: bool = False) -> None:
        """Raises JetExportError if the engine cannot run `slots` sequences."""
        limits = engine.limits
        if limits.max_batch_size < slots:
            raise JetExportError(
                f"draft: its max_batch_size is {limits.max_batch_size}; {slots} sequences run at once.",
                f"Build it with --max-batch-size {slots}.",
            )
        self.engine = engine
        full, ring = pages_per_sequence(engine.config, limits.max_seq_len, limits.prefill_chunk)
        pools = PoolSize(slots=slots, pages=slots * full, window_pages=slots * ring, table_pages=full, ring_pages=ring)
        self.runner = Runner(engine, cuda_graphs, pools=pools, deterministic=deterministic)
        for slot in range(slots):
            own = range(slot * full, (slot + 1) * full), range(slot * ring, (slot + 1) * ring)
            self.runner.assign(slot, *map(list, own))
        self.known: dict[RunningSequence, int] = {}  # tokens of each that its states hold
        named = zip(engine.specs, self.runner.states, strict=True)
        self.states = [pool for spec, pool in named if spec.rows == "slots"]
        self.before = [torch.zeros_like(pool) for pool in self.states]  # the slots' states before they drafted

    def forget(self, sequence: RunningSequence) -> None:
        self.known.pop(sequence, None)

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        room = self.engine.limits.max_seq_len - len(sequence.prompt) - sequence.position
        return Match([0] * min(most, room), 0) if room > 0 else NO_MATCH

    @torch.inference_mode()
    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: Draw) -> list[list[int]]:
        """Those whose tokens do not fit a chunk, as a long prompt does at first, only go on by a chunk."""
        chunk, fed = self.engine.limits.prefill_chunk, []
        self._restore([s.request.slot for s in sequences if self.known.get(s)])
        for s in sequences:
            known, total = self.known.get(s, 0), len(s.prompt) + s.position
            self.runner.hold(s.request.slot, known)
            fed.append(s.fed(known, min(total - known, chunk)))
            self.known[s] = known + len(fed[-1])
        logits = self._feed([s.request.slot for s in sequences], fed)
        self._save([s.request.slot for s in sequences])
        rows = [i for i, s in enumerate(sequences) if self.known[s] == len(s.prompt) + s.position]
        rows.sort(key=lambda i: -len(offers[i].tokens))
        drafts: list[list[int]] = [[] for _ in sequences]
        if rows:
            lengths = [len(offers[i].tokens) for i in rows]
            found = self._decode([sequences[i].request.slot for i in rows], logits[rows], lengths, draw)
            for n, i in enumerate(rows):
                drafts[i] = [tokens[n] for tokens in found if n < len(tokens)]
        for s in sequences:
            self.runner.hold(s.request.slot, self.known[s])
        return drafts

    def _decode(self, slots: list[int], logits: Tensor, lengths: list[int], draw: Draw) -> list[list[int]]:
        """The first tokens of all slots, the second ones of those that have two, ...; `lengths` descend."""
        drawn = [draw(logits, slots, [0] * len(slots))]
        for ahead in range(1, lengths[0]):
            n = sum(length > ahead for length in lengths)
            logits = self.runner.decode(slots[:n], drawn[-1][:n].clamp_min(0))
            drawn.append(draw(logits, slots[:n], [ahead] * n))
        flat = torch.cat(drawn).tolist()  # waits once
        return [flat[a:b] for a, b in pairwise(accumulate(map(len, drawn), initial=0))]

    def _feed(self, slots: list[int], tokens: list[list[int]]) -> Tensor:
        """Logits [slots, vocab] behind the tokens of each, in as many calls as they need."""
        most, logits, begin = self.engine.limits.max_prefill_tokens, [], 0
        while begin < len(slots):
            end, total = begin, 0
            while end < len(slots) and (end == begin or total + len(tokens[end]) <= most):
                total += len(tokens[end])
                end += 1
            logits.append(self.runner.prefill(slots[begin:end], tokens[begin:end]))
            begin = end
        return torch.cat(logits)

    def _save(self, slots: list[int]) -> None:
        index = self.runner.to_device(torch.tensor(slots))
        for pool, before in zip(self.states, self.before, strict=True):
            before[index] = pool[index]

    def _restore(self, slots: list[int]) -> None:
        if slots:
            index = self.runner.to_device(torch.tensor(slots))
            for pool, before in zip(self.states, self.before, strict=True):
                pool[index] = before[index]


def load_draft(path: str | Path, tokenizer: Tokenizer | ByteTokenizer, vocab: int) -> Engine:
    """The engine of a draft bundle. Raises JetExportError if its tokens are not those of `tokenizer`."""
    own = load_tokenizer(path)
    same = type(own) is type(tokenizer)
    if isinstance(own, Tokenizer) and isinstance(tokenizer, Tokenizer):
        same = own.to_json() == tokenizer.to_json()
    if not same:
        raise JetExportError(
            f"draft {path}: its tokenizer is not the bundle's.", "Take a bundle of a model with the same tokenizer."
        )
    engine, manifest = load_engine(path)
    if manifest.config.vocab_size != vocab:
        raise JetExportError(
            f"draft {path}: its vocabulary has {manifest.config.vocab_size} tokens, the bundle's {vocab}.",
            "Take a bundle of a model with the same vocabulary.",
        )
    return engine


def draft_model(
    engine: Engine, tokenizer: Tokenizer | ByteTokenizer, serving: Serving, cuda_graphs: bool
) -> DraftModel | None:
    """Of the bundle that `serving` names, loaded; None if it names none."""
    if serving.draft is None:
        return None
    draft = load_draft(serving.draft, tokenizer, engine.config.vocab_size)
    slots = serving.slots or engine.limits.max_batch_size
    return DraftModel(draft, slots, cuda_graphs=cuda_graphs, deterministic=serving.deterministic)
