"""Drafts of the checkpoint's multi-token-prediction layer (model/mtp.py), which an engine has beside the model.

The layer reads pairs: a token's hidden state and the token behind it. Every call of the engine leaves the hidden states
of its tokens in the pages of full attention, where prefixes, sessions and preempted requests have theirs too, and where
the states of tokens that are taken back are written over. The layer's keys and values are in pages of its own, a slot's
max_seq_len long. A draft's first token comes of the last known pair, each other one of the layer's own output and the
token before it; the next draft writes over what those left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.draft_model import Draw
from jet_export.runtime.mtp_calls import MtpCalls
from jet_export.runtime.prompt_lookup import NO_MATCH, Match
from jet_export.runtime.sequence import RunningSequence
from jet_export.utils.errors import JetExportError


@dataclass(frozen=True, kw_only=True)
class Fed:
    """Pairs of a sequence in a feeding call."""

    i: int  # of the sequence, among those of the draft
    first: int
    n: int
    drafts: int  # tokens to draft: none where more pairs are to come


class MtpDraft:
    """A Proposer. Slot i of the batch has slot i here."""

    guesses = False

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engine, self.calls = engine, MtpCalls(engine, slots)
        self.known: dict[RunningSequence, int] = {}  # pairs of each that its keys and values are of

    def forget(self, sequence: RunningSequence) -> None:
        self.known.pop(sequence, None)

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        pairs = pairs_of(sequence)
        room = self.engine.limits.max_seq_len - pairs - 1
        return Match([0] * min(most, room), 0) if pairs > 0 and room > 0 else NO_MATCH

    @torch.inference_mode()
    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: Draw) -> list[list[int]]:
        """Those whose pairs do not fit a call, as a long prompt's do not at first, only go on by some."""
        if self.calls.runner.deterministic and len(sequences) > 1:  # the others change no bit of a draft
            return [d for s, o in zip(sequences, offers, strict=True) for d in self.draft([s], [o], draw)]
        fed = sorted(self._plan(sequences, offers), key=lambda f: -f.drafts)
        slots = [sequences[f.i].request.slot for f in fed]
        tokens, held = [sequences[f.i].fed(f.first + 1, f.n) for f in fed], [f.first for f in fed]
        logits = self.calls.feed(slots, tokens, held)
        drafts: list[list[int]] = [[] for _ in sequences]
        rows = [f for f in fed if f.drafts]
        if rows:
            self.calls.begin(slots[: len(rows)], [f.first + f.n for f in rows], [f.drafts - 1 for f in rows])
            found = self._go_on(logits[: len(rows)], slots[: len(rows)], [f.drafts for f in rows], draw)
            for n, f in enumerate(rows):
                drafts[f.i] = [tokens[n] for tokens in found[: f.drafts]]
        return drafts

    def _plan(self, sequences: Sequence[RunningSequence], offers: Sequence[Match]) -> list[Fed]:
        """What is fed: of all but the first sequences, where a call is full."""
        limits, left = self.engine.limits, self.engine.limits.max_prefill_tokens
        fed = []
        for i, (s, offer) in enumerate(zip(sequences, offers, strict=True)):
            pairs = pairs_of(s)
            first = min(self.known.get(s, 0), pairs - 1)  # the last pair again, where it has been fed
            n = min(pairs - first, limits.prefill_chunk, left)
            if n == 0:
                break
            left -= n
            self.known[s] = first + n
            fed.append(Fed(i=i, first=first, n=n, drafts=len(offer.tokens) if first + n == pairs else 0))
        return fed

    def _go_on(self, logits: Tensor, slots: list[int], lengths: list[int], draw: Draw) -> list[list[int]]:
        """The first tokens of all slots, by `logits`, the second of those that have two, ...; `lengths` descend."""
        drawn = [draw(logits, slots, [0] * len(slots))]
        for ahead in range(1, lengths[0]):
            n = sum(length > ahead for length in lengths)
            logits = self.calls.step(drawn[-1][:n])
            drawn.append(draw(logits, slots[:n], [ahead] * n))
        flat = torch.cat(drawn).tolist()  # waits once
        return [flat[a:b] for a, b in pairwise(accumulate(map(len, drawn), initial=0))]


def pairs_of(sequence: RunningSequence) -> int:
    """Its tokens but the last, whose hidden state is still to come."""
    return len(sequence.prompt) + sequence.position - 1


def mtp_draft(engine: Engine, serving: Serving) -> MtpDraft | None:
    """Where `serving` asks for it. Raises JetExportError for a bundle without the layer."""
    if serving.speculate != "mtp":
        return None
    if not engine.mtp:
        raise JetExportError(
            "speculate mtp: the bundle has no multi-token-prediction layer.",
            "Build it of a Qwen3.5 checkpoint with --speculate N --mtp, or draft by speculate lookup.",
        )
    return MtpDraft(engine, serving.slots or engine.limits.max_batch_size)
