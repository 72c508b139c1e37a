"""What `jet-export bench` runs: a protocol's cases, and those that the bundle's limits or the memory do not allow.

paper      the paper's own batches and chunks (arXiv 2508.15884): random ids, chunked prefill, greedy decoding, 128 new
           tokens, each step timed, the first steps dropped
latency    one sequence, or --batch, at 1K to 128K tokens
serving    requests that arrive together, with continuous batching (serving.py)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jet_export.bench.measure import Case, check_case
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.bundle.memory import MemoryBudget
from jet_export.runtime.params import Params
from jet_export.utils.console import human
from jet_export.utils.errors import JetExportError

PROTOCOLS = ("latency", "paper", "serving")
PAPER = {4096: (1024, 256), 65536: (128, 2048), 262144: (64, 2048)}  # context: batch, chunk
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
NEW_TOKENS = 128
FIRST_TOKENS = 10  # most fills of a latency case, each a sample of the time to first token


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for. batches None: the protocol's own; 0: auto, the largest that fits."""

    protocol: str
    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    new_tokens: int = NEW_TOKENS
    params: Params = field(default_factory=Params)  # sampling of the serving protocol; the others decode greedily
    mixed_prefill: int | None = None  # of the serving protocol: Serving.mixed_prefill


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A case that does not run here, why, and what would allow it."""

    context: int
    batch: int
    chunk: int
    reason: str
    remedy: str


@dataclass(frozen=True)
class Room:
    """A bundle and the memory that its batches are chosen by."""

    manifest: Manifest
    budget: MemoryBudget

    @classmethod
    def of(cls, manifest: Manifest, *, weights: int, available: int) -> Room:
        """`weights`: their bytes; `available`: the bytes that may be used, weights included."""
        m = manifest
        return cls(m, MemoryBudget(config=m.config, dtypes=m.dtypes, weights=weights, available=available))

    def needed(self, case: Case) -> int:
        """Bytes that a case takes."""
        limits = Limits(max_batch_size=case.batch, max_seq_len=case.tokens, prefill_chunk=case.chunk)
        return self.budget.memory(limits).total

    def largest(self, tokens: int, chunk: int) -> int:
        """The most sequences of so many tokens that fit."""
        return self.budget.largest_batch(max_seq_len=tokens, prefill_chunk=chunk)


def parse_contexts(text: str | None) -> tuple[int, ...] | None:
    """ "1024,4096,64k" -> tokens; k is 1,024. Raises JetExportError."""
    if text is None:
        return None
    try:
        contexts = [int(p[:-1]) * 1024 if p.lower().endswith("k") else int(p) for p in text.split(",")]
    except ValueError:
        contexts = []
    if not contexts or min(contexts) < 1:
        raise JetExportError(f"--contexts {text}: not a list of positive numbers.", "For example: 1024,4096,64k")
    return tuple(dict.fromkeys(contexts))


def parse_batches(text: str | None) -> tuple[int, ...] | None:
    """ "auto" -> (0,), "1,8" -> (1, 8). Raises JetExportError."""
    if text is None:
        return None
    words = text.split(",")
    if any(w != "auto" and not (w.isascii() and w.isdecimal() and int(w)) for w in words):
        raise JetExportError(f"--batch {text}: neither auto nor positive numbers.")
    return tuple(dict.fromkeys(0 if w == "auto" else int(w) for w in words))


def wanted(asked: Asked, limits: Limits) -> list[tuple[int, int, int]]:
    """(context, batch, chunk) of every case, batch 0 for auto. Raises JetExportError for a context not in the paper."""
    if asked.protocol == "paper":
        contexts = asked.contexts or tuple(PAPER)
        unknown = [c for c in contexts if c not in PAPER]
        if unknown:
            raise JetExportError(
                f"--protocol paper: the paper has no context of {unknown[0]} tokens.",
                f"It has {', '.join(map(str, PAPER))}; --protocol latency takes any.",
            )
        return [(c, b, PAPER[c][1]) for c in contexts for b in asked.batches or (PAPER[c][0],)]
    return [(c, b, min(c, limits.prefill_chunk)) for c in asked.contexts or CONTEXTS for b in asked.batches or (1,)]


def plan_cases(asked: Asked, room: Room) -> tuple[list[Case], list[Skipped], list[str]]:
    """The cases to run, those that cannot, and notes on what `auto` chose."""
    limits = room.manifest.limits
    cases, skipped, notes = [], [], []
    for context, batch, chunk in wanted(asked, limits):
        tokens = context + asked.new_tokens
        if batch == 0:
            most = room.largest(tokens, chunk)
            batch = min(most, limits.max_batch_size)
            if batch < most and tokens <= limits.max_seq_len:
                notes.append(
                    f"context {context}: batch {batch} is the bundle's max_batch_size; the memory holds {most}: "
                    + rebuild(
                        room.manifest,
                        Limits(max_batch_size=most, max_seq_len=limits.max_seq_len, prefill_chunk=limits.prefill_chunk),
                    )
                )
            batch = max(batch, 1)
        repeats = FIRST_TOKENS if asked.protocol == "latency" and batch == 1 else 1
        case = Case(batch=batch, context=context, chunk=chunk, new_tokens=asked.new_tokens, repeats=repeats)
        problem = unfit(case, room)
        if problem is None:
            cases.append(case)
        else:
            skipped.append(skip(case, *problem))
    return cases, skipped, notes


def skip(case: Case, reason: str, remedy: str) -> Skipped:
    return Skipped(context=case.context, batch=case.batch, chunk=case.chunk, reason=reason, remedy=remedy)


def unfit(case: Case, room: Room) -> tuple[str, str] | None:
    """(why a case does not run, what would allow it), or None. Memory comes first, since no other build helps there."""
    needed, available = room.needed(case), room.budget.available
    if needed > available:
        most = room.largest(case.tokens, case.chunk)
        remedy = f"--batch {most} fits" if most else "not one sequence fits: --kv-cache-dtype fp8 and --fp8 take less"
        return f"needs {human(needed)}, {human(available)} are free", remedy
    limits = room.manifest.limits
    reason = check_case(case, limits)
    if reason is None:
        return None
    enough = Limits(
        max_batch_size=max(limits.max_batch_size, case.batch),
        max_seq_len=max(limits.max_seq_len, case.tokens),
        prefill_chunk=max(limits.prefill_chunk, case.chunk),
    )
    return reason, rebuild(room.manifest, enough)


def rebuild(manifest: Manifest, limits: Limits) -> str:
    """The bundle's build command with other limits, where they differ."""
    command = list(manifest.build.get("command") or ["jet-export", "build"])
    for name in ("max_batch_size", "max_seq_len", "prefill_chunk"):
        value = getattr(limits, name)
        if value != getattr(manifest.limits, name):
            command = with_option(command, "--" + name.replace("_", "-"), str(value))
    return " ".join(command if "--force" in command else [*command, "--force"])


def with_option(command: list[str], flag: str, value: str) -> list[str]:
    """The command with one option set; an earlier `--flag 1` or `--flag=1` is removed."""
    out, skip = [], False
    for word in command:
        if skip or word == flag:
            skip = word == flag and not skip
        elif not word.startswith(f"{flag}="):
            out.append(word)
    return [*out, flag, value]


def throughput_only(manifest: Manifest, context: int) -> bool:
    """Whether the context exceeds the model's positions, where the text means nothing and only speed counts."""
    return context > manifest.config.max_position_embeddings
