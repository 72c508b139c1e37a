"""Checks bit for bit what a step reads: no rounding is involved, so these checks need no bounds.

A step is repeated from the same states, some of them altered:
- What it must not read (keys outside the window or not yet written, unused pages and slots) is filled with other noise.
  Every result must stay the same to the bit.
- One thing that it must read (a tap of the convolution state, a recurrent state, a window's oldest key) is altered in
  one sequence. The engine's results must change wherever the eager model's do, and those of other sequences must not.
A window that is one key too long fails the first check, one that is too short the second, however little that key
contributes to the logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.eager import EagerEngine
from jet_export.model.cache import BESIDE_STATE, HIDDEN, StateSpec
from jet_export.verify.trial import SEQUENCES, Call, Trial, decode_step, prefill_step, raw

ALTERED = 0  # the sequence whose states are altered
Results = tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]  # before, after; of each sequence by name


@dataclass(frozen=True)
class Probe:
    """One alteration and its outcome."""

    step: str
    what: str
    failure: str = ""  # empty where the step did as it should


class Stepper:
    """Repeats one step from fixed states, with alterations."""

    def __init__(self, engine: Engine, base: Trial, call: Call) -> None:
        self.trial = Trial(engine, base.layout, base.prompts)
        self.base, self.call = base, call

    def __call__(self, pool: int | None = None, altered: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Each sequence's results by name: logits, states, new keys and values. `altered` replaces the state `pool`."""
        states = list(self.base.states)
        if pool is not None and altered is not None:
            states[pool] = altered
        return self.run(states)

    def run(self, states: list[Tensor]) -> list[dict[str, Tensor]]:
        t = self.trial
        t.load(states, self.base.held)
        logits = t.step(self.call)
        live = [r for r in self.call.rows if r >= 0]
        counts = [n for r, n in zip(self.call.rows, self.call.lens, strict=True) if r >= 0]
        per_row = dict(zip(live, torch.split(logits, counts), strict=True))
        return [{"logits": per_row[n], **self._states(n)} for n in range(SEQUENCES)]

    def _states(self, sequence: int) -> dict[str, Tensor]:
        t, out = self.trial, {}
        for spec, pool in zip(t.engine.specs, t.states, strict=True):
            if spec.rows == "slots":
                out[spec.name] = pool[int(t.layout.slots[sequence])].clone()
            else:
                where = t.layout.positions(spec, sequence, self.base.held[sequence], t.held[sequence])
                out[spec.name] = raw(pool)[where[0], :, :, where[1]]
        return out


def changed(before: dict[str, Tensor], after: dict[str, Tensor], layer: int = -1) -> list[str]:
    """Names of the results that differ, among the logits and the layers above `layer`."""
    names = [n for n in before if n == "logits" or int(n.split(".")[1]) > layer]
    return [n for n in names if not torch.equal(before[n], after[n])]


def run_probes(engine: Engine, eager: EagerEngine, base: Trial) -> list[Probe]:
    """Probe a decode step and a short prefill that start from the states of `base`, a trial of the eager model."""
    out: list[Probe] = []
    for name, call in (("decode", decode_step()), ("prefill", prefill_step(eager.limits))):
        ours, theirs = Stepper(engine, base, call), Stepper(eager, base, call)
        plain, expected = ours(), theirs()
        again = ours()
        noisy = sorted({c for n in range(SEQUENCES) for c in changed(plain[n], again[n])})
        if noisy:
            out.append(Probe(name, "the same step twice", f"{name}: the same step twice differs in {noisy[0]}"))
            continue
        out.append(Probe(name, "the same step twice"))
        out += unseen_probes(name, ours, plain)
        for i, what, altered in visible_alterations(base):
            a, b = ours(i, altered), theirs(i, altered)
            out.append(visible_probe(name, what, base.engine.specs[i].layer, (plain, a), (expected, b)))
    return out


def unseen_probes(name: str, ours: Stepper, plain: list[dict[str, Tensor]]) -> Iterator[Probe]:
    """Change what no sequence may read, pool by pool."""
    for i, spec in enumerate(ours.base.engine.specs):
        what = f"layers.{spec.layer}: " + (
            "rows of other slots" if spec.rows == "slots" else "keys and values out of view"
        )
        after = ours(i, refill_unseen(ours.base, i))
        bad = [c for n in range(SEQUENCES) for c in changed(plain[n], after[n])]
        yield Probe(name, what, f"{name}: {what} change {bad[0]}" if bad else "")


def visible_probe(name: str, what: str, layer: int, ours: Results, theirs: Results) -> Probe:
    """`ours`, `theirs`: the engine's and the eager model's results before and after sequence ALTERED was altered."""
    for n in range(SEQUENCES):
        bad = changed(ours[0][n], ours[1][n])
        if n != ALTERED and bad:
            return Probe(name, what, f"{name}: {what} of one sequence changes {bad[0]} of another")
    expected = changed(theirs[0][ALTERED], theirs[1][ALTERED], layer)
    if expected and not changed(ours[0][ALTERED], ours[1][ALTERED], layer):
        return Probe(name, what, f"{name}: {what} is not read: no result above layer {layer} depends on it")
    return Probe(name, what)


def refill_unseen(base: Trial, i: int) -> Tensor:
    """The pool with other noise wherever a step from `base` must not read."""
    spec, pool = base.engine.specs[i], base.states[i]
    fresh = noise_like(pool, i)
    if spec.rows == "slots":
        mine = base.layout.slots.to(pool.device)
        fresh[mine] = pool[mine]
        return fresh
    for n, held in enumerate(base.held):
        page, offset = base.layout.positions(spec, n, first_visible(base, spec, held), held)
        raw(fresh)[page, :, :, offset] = raw(pool)[page, :, :, offset]
    return fresh


def noise_like(pool: Tensor, seed: int) -> Tensor:
    """Large values within FP8's range: 64 times a standard normal."""
    rng = torch.Generator(device=pool.device).manual_seed(seed)
    noise = torch.randn(pool.shape, generator=rng, device=pool.device) * 64
    return noise.clamp(-448, 448).to(pool.dtype)


def first_visible(base: Trial, spec: StateSpec, held: int) -> int:
    """The oldest cached position that the next token attends to."""
    window = base.layout.config.window_size if spec.rows == "window_pages" else 0
    return max(0, held - window + 1) if window else 0


def visible_taps(base: Trial, spec: StateSpec) -> list[int]:
    """Rows of conv_state that sequence ALTERED's next token reads: all, or of a ring those of the last tokens."""
    rows, rollback, held = spec.shape[0], base.engine.rollback, base.held[ALTERED]
    return [(held - 1 - back) % rows for back in range(rows - rollback)] if rollback else list(range(rows))


def visible_alterations(base: Trial) -> Iterator[tuple[int, str, Tensor]]:
    """(pool, what, the pool altered in one thing that sequence ALTERED must read)."""
    held, layout = base.held[ALTERED], base.layout
    for i, (spec, pool) in enumerate(zip(base.engine.specs, base.states, strict=True)):
        if spec.rows == "slots":
            if spec.name.endswith(BESIDE_STATE):
                continue
            row = int(layout.slots[ALTERED])
            taps: Iterable[Any] = visible_taps(base, spec) if spec.name.endswith("conv_state") else [slice(None)]
            for tap in taps:
                altered = pool.clone()
                altered[row, tap] = noise_like(altered[row, tap], i)
                yield i, f"{spec.name}" + (f", tap {tap}" if isinstance(tap, int) else ""), altered
            continue
        if spec.name.endswith(HIDDEN):  # not read by the model
            continue
        edges = {first_visible(base, spec, held): "oldest", held - 1: "newest"}
        for position, age in edges.items():
            page, offset = layout.positions(spec, ALTERED, position, position + 1)
            altered = pool.clone()
            raw(altered)[page[0], 1, :, offset[0]] = raw(noise_like(pool[page[0], 1, :, 0], i))
            yield i, f"layers.{spec.layer}: value of the {age} key in view", altered
