"""Snapshots: the states of one slot, copied out of an engine's pools and back into any slot, pages and pool size.

    slots          the row of the slot                                            [*shape]
    pages          the pages of the tokens held, in order                         [cdiv(held, PAGE), *shape]
    window_pages   the pages the next token attends to: from held - window + 1    [pages, *shape], in order

Positions without a token are zero: a snapshot never contains another request's keys, nor drafts that were taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.model.cache import PAGE, StateSpec, cdiv
from jet_export.model.config import JetNemotronConfig
from jet_export.runtime.runner import Runner

States = dict[str, Tensor]  # by the name of the StateSpec


@dataclass(frozen=True)
class Snapshot:
    """A sequence between two steps: everything that its continuation depends on. Never modified."""

    tokens: tuple[int, ...]  # the tokens held, then at most one that was sampled but not decoded
    held: int
    states: States
    logits: Tensor | None = None  # [vocab] of the next token, if all of `tokens` are held

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.states.values())


EMPTY = Snapshot((), 0, {})


def window_range(config: JetNemotronConfig, held: int) -> range:
    """Pages of a sequence that a sliding-window layer's next token attends to."""
    first = max(0, held - config.window_size + 1) if config.window_size else 0
    return range(first // PAGE, cdiv(held, PAGE))


def state_shape(spec: StateSpec, config: JetNemotronConfig, held: int) -> tuple[int, ...]:
    """Shape of one state in a snapshot of `held` tokens."""
    if spec.rows == "slots":
        return spec.shape
    n = cdiv(held, PAGE) if spec.rows == "pages" else len(window_range(config, held))
    return (n, *spec.shape)


def indexable(x: Tensor) -> Tensor:
    """FP8 as bytes: torch cannot index FP8 tensors."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _rows(runner: Runner, slot: int, held: int, full_attention: bool) -> Iterator[tuple[StateSpec, Tensor, Tensor]]:
    """(spec, pool, rows of the pool that belong to the slot) of each state."""
    ring = runner.window_block_table.shape[1]
    window = [j % ring for j in window_range(runner.engine.config, held)]
    index = {
        "slots": torch.tensor([slot], device=runner.device),
        "pages": runner.block_table[slot, : cdiv(held, PAGE)].long(),
        "window_pages": runner.window_block_table[slot, torch.tensor(window, dtype=torch.long)].long(),
    }
    for spec, pool in zip(runner.engine.specs, runner.states, strict=True):
        if full_attention or spec.rows != "pages":
            yield spec, indexable(pool), index[spec.rows]


@torch.inference_mode()
def save_states(runner: Runner, slot: int, full_attention: bool = True) -> States:
    """Copy a slot's states; without `full_attention`, those of full-attention layers are left out."""
    held, out = runner.context_lens[slot], {}
    for spec, pool, rows in _rows(runner, slot, held, full_attention):
        copy = pool[rows]
        if spec.rows == "slots":
            copy = copy[0]
        elif held % PAGE:
            copy[-1, :, :, held % PAGE :] = 0
        out[spec.name] = copy.view(spec.dtype)
    for spec in runner.engine.specs:
        if spec.name in out:
            _clear(out, spec, held, runner.engine)
    return out


def _clear(states: States, spec: StateSpec, held: int, engine: Engine) -> None:
    """Zero the rows of a ring or buffer that are of tokens that are not held, or not needed any more."""
    layer, _, kind = spec.name.rpartition(".")
    rows = torch.arange(spec.shape[-2] if len(spec.shape) > 1 else 0, device=engine.device)
    if kind == "step_buffer":  # [H, rows, columns]
        count = held - states[f"{layer}.state_position"]  # [H]
        states[spec.name].masked_fill_((rows >= count[:, None])[..., None], 0)
    elif kind == "conv_state" and engine.rollback:  # [rows, D], a ring
        needed = torch.arange(max(0, held - engine.config.conv_size + 1), held, device=engine.device) % len(rows)
        states[spec.name].masked_fill_(~torch.isin(rows, needed)[:, None], 0)


@torch.inference_mode()
def load_states(runner: Runner, slot: int, held: int, states: States) -> None:
    """Write `states` into a slot that `assign` has just given its pages. States left out must be there already."""
    full_attention = any(s.rows == "pages" and s.name in states for s in runner.engine.specs)
    for spec, pool, rows in _rows(runner, slot, held, full_attention):
        source = indexable(states[spec.name].to(runner.device))
        pool[rows] = source[None] if spec.rows == "slots" else source
    runner.hold(slot, held)
