"""An engine's quality, compared with the unquantised checkpoint: reported, with no bounds.

bits per byte = sum of -log2 p(token) / bytes over windows of `WINDOW` tokens, half a window apart, each token scored
once, where it has most context; KL(unquantised || engine) per token and the share of equal argmaxes on the same tokens;
recall (jet-tiny): the share of key-value queries in code whose four digits are all right, by the definition's distance.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.eager import EagerEngine
from jet_export.bundle.manifest import Manifest
from jet_export.model.hf_files import TOKENIZER, tokenizer_directory
from jet_export.model.hub import JET_TINY_DIR, local_directory
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.runner import Runner
from jet_export.runtime.tokenizer import Tokenizer
from jet_export.utils.files import DATA, sha256_file
from jet_export.verify.parity import kl_divergence, limited

HELD_OUT = DATA / "heldout.txt"
RECALL = DATA / "recall.jsonl"
SLICE_BYTES = 16384  # of the text
WINDOW = 2048
DISTANCES = (0, 128, 512, 2048)  # bounds of the bins of recall, tokens
DEFINITION, QUERY = re.compile(r"^([A-Z]\d\d)=\d{4}$", re.M), re.compile(r"^([A-Z]\d\d)\?(\d{4})$", re.M)


@dataclass
class Quality:
    """Figures on held-out text and recall."""

    tokens: int
    bytes: int
    bits_per_byte: dict[str, float] = field(default_factory=dict)  # "engine", and "unquantised" where it is available
    kl: float | None = None  # mean KL(unquantised || engine), nats a token
    top1: float | None = None
    recall: dict[str, dict[str, float]] = field(default_factory=dict)  # by distance: engine, unquantised, queries

    def failures(self) -> list[str]:
        values = {**{f"bits per byte ({k})": v for k, v in self.bits_per_byte.items()}, "KL": self.kl}
        return [f"held-out text: {k} is {v}" for k, v in values.items() if v is not None and not math.isfinite(v)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> list[Table]:
        text = Table(box=None, header_style="bold")
        names = list(self.bits_per_byte)
        for column in (f"held-out text ({self.bytes} bytes)", *names):
            text.add_column(column, justify="left" if column.startswith("held") else "right")
        text.add_row("bits per byte", *(f"{self.bits_per_byte[n]:.4f}" for n in names))
        if self.kl is not None and self.top1 is not None:
            text.add_row("KL(unquantised || engine), nats a token", f"{self.kl:.2e}")
            text.add_row("same most likely token", f"{self.top1:.2%}")
        for distance, r in self.recall.items():
            label = f"recall {distance} tokens back ({r['queries']:.0f} queries)"
            text.add_row(label, *(f"{r[n]:.1%}" for n in names))
        return [text]


class Query(NamedTuple):
    """A question for a value defined earlier in the text."""

    positions: list[int]  # of the answer's tokens
    distance: int  # tokens from the definition's "=" to the query's "?"


def measure_quality(engine: Engine, manifest: Manifest, directory: Path, text: str) -> Quality:
    """Measure on held-out text, and recall where the tokenizer is jet-tiny's."""
    engines: dict[str, Engine] = {"engine": engine}
    plain = unquantised_engine(manifest)
    if plain is not None:
        engines["unquantised"] = plain
    runners = {name: Runner(limited(e, 1, WINDOW), cuda_graphs=False) for name, e in engines.items()}
    path = tokenizer_directory(directory) / TOKENIZER
    tokenizer = Tokenizer(path)
    piece = text.encode()[:SLICE_BYTES].decode(errors="ignore")
    start = [t for t in (manifest.config.eos_token_id, manifest.config.bos_token_id) if t >= 0][:1]
    out = held_out(runners, [*start, *tokenizer.encode(piece)], len(piece.encode()))
    if sha256_file(path) == sha256_file(JET_TINY_DIR / TOKENIZER):
        out.recall = recall(runners, HfTokenizer.from_file(str(path)))
    return out


def unquantised_engine(manifest: Manifest) -> EagerEngine | None:
    """An eager engine of the checkpoint that the bundle was built from, if that is on this machine."""
    source = str(manifest.model["source"])
    directory = local_directory(manifest.model["name"]) or (Path(source) if Path(source).is_dir() else None)
    if source.startswith("random weights") or directory is None:
        return None
    built_from = manifest.build.get("inputs", {}).get("weights", {})
    if built_from != {p.name: sha256_file(p) for p in directory.glob("*.safetensors")}:
        return None  # its weights have changed
    m = manifest
    model = JetNemotronForCausalLM.from_pretrained(directory, m.dtypes.model, m.device, m.limits.max_seq_len)
    return EagerEngine(model, manifest.limits)


def windows(ids: list[int], size: int) -> Iterator[tuple[list[int], int]]:
    """(tokens, how many of the first targets an earlier window has scored). ids[0] is context only."""
    for start in range(0, max(1, len(ids) - 1), size // 2):
        tokens = ids[start : start + size + 1]
        skip = size // 2 if start else 0
        if skip < len(tokens) - 1:
            yield tokens, skip


def all_logits(runner: Runner, tokens: list[int]) -> Tensor:
    """[len(tokens), vocab] fp32."""
    runner.reset(0)
    chunk = runner.limits.prefill_chunk
    parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    return torch.cat([runner.prefill([0], [part], all_logits=True).float() for part in parts])


@torch.no_grad()
def held_out(runners: dict[str, Runner], ids: list[int], size: int) -> Quality:
    """Bits per byte, KL and equal argmaxes on `ids`, the tokens of `size` bytes."""
    first = runners["engine"]
    out = Quality(len(ids) - 1, size)
    nats = dict.fromkeys(runners, 0.0)
    kl, same = 0.0, 0
    for tokens, skip in windows(ids, first.limits.max_seq_len):
        logits = {name: all_logits(r, tokens[:-1])[skip:] for name, r in runners.items()}
        targets = torch.tensor(tokens[1 + skip :], device=first.device)
        for name, x in logits.items():
            nats[name] += torch.nn.functional.cross_entropy(x, targets, reduction="sum").item()
        if len(logits) == 2:
            rows = zip(*(torch.split(logits[name], 256) for name in ("unquantised", "engine")), strict=True)
            kl += sum(kl_divergence(p, q).sum().item() for p, q in rows)
            same += int((logits["unquantised"].argmax(-1) == logits["engine"].argmax(-1)).sum())
    out.bits_per_byte = {name: n / math.log(2) / size for name, n in nats.items()}
    if len(runners) == 2:
        out.kl, out.top1 = kl / out.tokens, same / out.tokens
    return out


def read_queries(tokenizer: HfTokenizer, text: str) -> tuple[list[int], list[Query]]:
    """The tokens of a recall text, and its queries."""
    encoded = tokenizer.encode(text)

    def covering(start: int, end: int) -> list[int]:
        return [i for i, (a, b) in enumerate(encoded.offsets) if a < end and b > start]

    defined = {m[1]: covering(m.start() + 3, m.start() + 4)[-1] for m in DEFINITION.finditer(text)}
    queries = [
        Query(covering(*m.span(2)), covering(m.start() + 3, m.start() + 4)[-1] - defined[m[1]])
        for m in QUERY.finditer(text)
        if m[1] in defined
    ]
    return encoded.ids, queries


@torch.no_grad()
def recall(runners: dict[str, Runner], tokenizer: HfTokenizer) -> dict[str, dict[str, float]]:
    """By the teacher-forced argmax of every digit, which is right exactly where greedy decoding is."""
    right: dict[tuple[int, str], list[bool]] = {}
    for line in RECALL.read_text(encoding="utf-8").splitlines():
        ids, queries = read_queries(tokenizer, json.loads(line)["text"])
        ids = ids[: runners["engine"].limits.max_seq_len]
        for name, runner in runners.items():
            best = all_logits(runner, ids).argmax(-1).tolist()
            for q in queries:
                if q.positions[-1] < len(ids):
                    bin_ = next(i for i, high in enumerate(DISTANCES[1:]) if q.distance <= high)
                    right.setdefault((bin_, name), []).append(all(best[p - 1] == ids[p] for p in q.positions))
    out: dict[str, dict[str, float]] = {}
    for i, (low, high) in enumerate(itertools.pairwise(DISTANCES)):
        if (i, "engine") in right:
            shares = {name: sum(right[i, name]) / len(right[i, name]) for name in runners}
            out[f"{low + 1}-{high}"] = {**shares, "queries": len(right[i, "engine"])}
    return out
