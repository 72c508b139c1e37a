"""Published figures to compare ours with, each with its source. Not measured by `jet-export bench`."""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "paper (arXiv 2508.15884), its H100"
PUBLISHED = "published code as we ran it: one H100 80GB, torch 2.11.0+cu130, random weights, SDPA flash, 2026-11-23"


@dataclass(frozen=True)
class Reference:
    """kind: "decode" or "prefill"; tokens/s of all sequences together."""

    model: str
    kind: str
    context: int | None  # None: not stated
    batch: int
    tokens_per_s: float
    source: str


REFERENCES = (
    Reference("jet-2b", "decode", 65536, 128, 2885, PAPER),
    Reference("jet-4b", "decode", 65536, 64, 1271, PAPER),
    Reference("jet-2b", "decode", 1024, 1, 8.6, PUBLISHED),
    Reference("jet-4b", "decode", 1024, 1, 10.8, PUBLISHED),
    Reference("jet-2b", "decode", 4096, 512, 5236, PUBLISHED),
    Reference("jet-2b", "decode", 65536, 128, 1042, PUBLISHED),
    Reference("jet-4b", "decode", 65536, 64, 652, PUBLISHED),
    Reference("jet-2b", "decode", 262144, 32, 374, PUBLISHED),
    Reference("jet-2b", "prefill", None, 16, 94200, PUBLISHED),
    Reference("jet-4b", "prefill", None, 16, 50300, PUBLISHED),
)

# Jet-Nemotron-2B over Qwen3-1.7B-Base, context: ratio (the paper's headline; its H100).
PAPER_DECODE_RATIO = {4096: 15.6, 262144: 53.6}
PAPER_PREFILL_RATIO = {4096: 1.14, 262144: 6.14}


def references_of(model: str) -> list[Reference]:
    return [r for r in REFERENCES if r.model == model]
