"""The steps that verify runs, and trials: an engine that takes these steps on pools of its own.

Pools have more rows than the sequences use, in random order and filled with noise: an empty sequence must start from
zero whatever its rows hold. Window rings are as short as the calls allow, so that they wrap around.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.bundle.limits import Limits
from jet_export.kernels.step_buffer import current_state
from jet_export.model.cache import BESIDE_STATE, HIDDEN, PAGE, PackedBatch, StateSpec, pages_per_sequence
from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError

SEQUENCES = 3  # and one padding row: four rows, which every graph takes
DECODE_STEPS = 6
SPARE = 16  # tokens of the steps after the prompts
PROBE_TOKENS = 3  # most tokens of one sequence in `prefill_step`
LOGIT_ROWS = 64  # rows of logits compared in one call
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Call:
    """One engine call, on the next tokens of each sequence's prompt."""

    rows: tuple[int, ...]  # the sequence of each packed row; -1: padding
    lens: tuple[int, ...]
    decode: bool = False
    kept: tuple[int, ...] | None = None  # a verify call: of each row, the tokens that are not taken back

    @property
    def advance(self) -> tuple[int, ...]:
        """Tokens that each row holds more afterwards."""
        return self.lens if self.kept is None else self.kept


@dataclass(frozen=True)
class Stage:
    """Calls whose results are compared together."""

    name: str
    calls: tuple[Call, ...]
    forced: bool = False  # every trial starts from the eager model's states, so that errors do not accumulate


@dataclass(frozen=True)
class Scenario:
    """Stages on one set of pools, each continuing from the one before."""

    stages: tuple[Stage, ...]

    @property
    def longest_call(self) -> int:
        return max(n for s in self.stages for c in s.calls for n in c.lens)

    @property
    def tokens(self) -> int:
        """The most tokens that one sequence holds, with those of the probes' step at the end."""
        held = [0] * SEQUENCES
        for call in (c for s in self.stages for c in s.calls):
            for row, n in zip(call.rows, call.advance, strict=True):
                if row >= 0:
                    held[row] += n
        drafts = max((n for s in self.stages for c in s.calls if c.kept for n in c.lens), default=0)
        return max(held) + max(drafts, PROBE_TOKENS)


def decode_step() -> Call:
    return Call((1, -1, 0, 2), (1, 1, 1, 1), decode=True)


def prefill_step(limits: Limits) -> Call:
    return Call((2, 0, -1, 1), tuple(min(n, limits.prefill_chunk) for n in (3, 1, 2, 5)))


def verify_calls(rollback: int) -> tuple[Call, ...]:
    """Drafts of which all, some and none are kept, by sequences that had others in the call before."""
    most, some = rollback, (rollback + 1) // 2
    return (
        Call((1, -1, 0, 2), (most, 1, 1, some), kept=(1, 1, 1, some)),
        Call((2, 0, 1, -1), (most, some, most, most), kept=(most, 1, some, 1)),
        Call((0, 1, 2), (most, 1, most), kept=(1, 1, some)),
    )


def scenarios(config: JetNemotronConfig, limits: Limits, rollback: int = 0) -> list[Scenario]:
    """Prompts cross the window's edge, several pages and the end of the ring, as far as the limits allow."""
    room, chunk = limits.max_seq_len - SPARE - 3 * rollback, limits.prefill_chunk
    if room < SPARE:
        raise JetExportError(
            f"verify: max_seq_len {limits.max_seq_len} is too short to compare anything.",
            f"Build with --max-seq-len {2 * SPARE} or more.",
        )
    past_window = config.window_size + PAGE + 9
    split = chunk_sizes(min(room, config.window_size + 4 * PAGE + 41), chunk)
    most = min(chunk, room // 2, max(limits.max_prefill_tokens, 32) // 3)
    a, b, c, d = (min(most, n) for n in (past_window, 65, 5, 2))
    ragged = (Call((2, -1, 0), (c, b, a)), Call((0, 1, -1, 2), (b, d, 1, a)), Call((1, 0), (b, 1)))
    decode = tuple(Call(rows, (1,) * 4, True) for rows in ((0, 2, -1, 1), (2, 1, 0, -1)) * (DECODE_STEPS // 2))
    return [
        Scenario((Stage("prefill", (Call((0,), (min(chunk, room, config.window_size + 2 * PAGE + 37),)),)),)),
        Scenario((Stage("chunked prefill", tuple(Call((1,), (n,)) for n in split)),)),
        Scenario(
            (
                Stage("ragged batch", ragged),
                Stage("decode", decode),
                Stage("decode, one sequence", tuple(Call((row,), (1,), True) for row in (2, 0, 2))),
                *((Stage("verify drafts", verify_calls(rollback)),) if rollback else ()),
                Stage("one decode step", (decode_step(),), forced=True),
                Stage("one prefill step", (prefill_step(limits),), forced=True),
            )
        ),
    ]


def chunk_sizes(tokens: int, chunk: int) -> list[int]:
    """An uneven split: tails of the convolution (1, 2, 3), a page and one more, a chunk kernel's block and one less."""
    sizes: list[int] = []
    while tokens > 0:
        for n in (1, 2, 3, 63, PAGE + 1, 1, 64, 17, 2, PAGE, 100):
            sizes.append(min(n, chunk, tokens))
            tokens -= sizes[-1]
            if tokens == 0:
                break
    return sizes


class Layout:
    """Which pool rows belong to which sequence. `rows`: rows of each pool, two of them unused."""

    def __init__(
        self, config: JetNemotronConfig, *, tokens: int, longest_call: int, seed: int, device: torch.device
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        pages, ring = pages_per_sequence(config, tokens, longest_call)
        self.config, self.seed, self.device = config, seed, device
        self.rows = {"slots": SEQUENCES + 2, "pages": SEQUENCES * pages + 2, "window_pages": SEQUENCES * ring + 2}
        order = {name: torch.randperm(n, generator=rng) for name, n in self.rows.items()}
        self.slots = order["slots"][:SEQUENCES]
        self.tables = {n: order[n][:-2].reshape(SEQUENCES, -1) for n in ("pages", "window_pages")}
        self.unused = {"slots": order["slots"][SEQUENCES:], **{n: order[n][-2:] for n in self.tables}}

    def noise(self, spec: StateSpec) -> Tensor:
        """The initial content of a pool."""
        rng = torch.Generator(device=self.device).manual_seed(self.seed + spec.layer)
        return torch.randn(self.rows[spec.rows], *spec.shape, generator=rng, device=self.device).to(spec.dtype)

    def batch(self, call: Call, held: list[int]) -> PackedBatch:
        live = [max(r, 0) for r in call.rows]
        slots = [int(self.slots[r]) if r >= 0 else -1 for r in call.rows]
        ends = [0, *torch.tensor(call.lens).cumsum(0).tolist()]
        context = [held[r] if r >= 0 else 0 for r in call.rows]
        tables = [self.tables[n][live].tolist() for n in ("pages", "window_pages")]
        parts = (ends, slots, context, *tables)
        return PackedBatch(*(torch.tensor(x, dtype=torch.int32, device=self.device) for x in parts))

    def positions(self, spec: StateSpec, sequence: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """(page, offset) of positions [first, end) of a sequence that are still in the pool."""
        table = self.tables[spec.rows][sequence]
        p = torch.arange(max(first, end - len(table) * PAGE), end)
        return table[(p // PAGE) % len(table)].to(self.device), (p % PAGE).to(self.device)


def raw(pool: Tensor) -> Tensor:
    """An FP8 pool as bytes, since torch does not index FP8."""
    return pool.view(torch.uint8) if pool.dtype == FP8 else pool


class Trial:
    """An engine on pools of its own. `held[n]`: the number of tokens that sequence n holds."""

    def __init__(self, engine: Engine, layout: Layout, prompts: list[list[int]]) -> None:
        self.engine, self.layout, self.prompts = engine, layout, prompts
        self.states = [layout.noise(s) for s in engine.specs]
        self.guards = self._unused()
        self.held = [0] * SEQUENCES

    def _unused(self) -> list[Tensor]:
        """The contents of unused rows."""
        pools = zip(self.engine.specs, self.states, strict=True)
        return [raw(pool)[self.layout.unused[s.rows].to(pool.device)] for s, pool in pools]

    def load(self, states: list[Tensor], held: list[int]) -> None:
        for mine, theirs in zip(self.states, states, strict=True):
            mine.copy_(theirs)
        self.held = list(held)

    def step(self, call: Call) -> Tensor:
        """Run a call. Logits [rows, vocab] in fp32, of each sequence's last token and of others across the call."""
        batch = self.layout.batch(call, self.held)
        ids: list[int] = []
        live: list[int] = []
        for row, n in zip(call.rows, call.lens, strict=True):
            live += [len(ids) + i for i in range(n)] if row >= 0 else []
            ids += self.prompts[row][self.held[row] : self.held[row] + n] if row >= 0 else [0] * n
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.layout.device)
        if call.decode or call.kept is not None:
            run = self.engine.decode if call.decode else self.engine.verify
            logits = run(tokens, batch, self.states)[torch.tensor(live, device=self.layout.device)]
        else:
            last = [e - 1 for e, r in zip(batch.cu_seqlens[1:].tolist(), call.rows, strict=True) if r >= 0]
            spread = live[:: -(-len(live) // LOGIT_ROWS)]
            indices = torch.tensor(sorted({*last, *spread}), dtype=torch.int32, device=self.layout.device)
            logits = self.engine.prefill(tokens, batch, indices, self.states)
        for row, n in zip(call.rows, call.advance, strict=True):
            if row >= 0:
                self.held[row] += n
        return logits.float()

    def snapshot(self, since: list[int] | None = None) -> dict[str, Tensor]:
        """Each layer's states, [rows, features] fp32: conv_state has a row per tap, recurrent_state a row per head
        (with the tokens kept beside it applied), k and v a row per head and position (from `since` on). FP8 caches: the
        values of their codes."""
        out: dict[str, Tensor] = {}
        for i, (spec, pool) in enumerate(zip(self.engine.specs, self.states, strict=True)):
            if spec.name.endswith(BESIDE_STATE):
                continue
            if spec.name.endswith("recurrent_state"):
                out[spec.name] = self.recurrent_state(i).flatten(0, 1).flatten(1)
                continue
            if spec.rows == "slots":
                rows = pool[self.layout.slots.to(pool.device)]
                out[spec.name] = rows.float().flatten(0, 1).flatten(1)
                continue
            parts = []
            for n, end in enumerate(self.held):
                page, offset = self.layout.positions(spec, n, since[n] if since else 0, end)
                parts.append(raw(pool)[page, :, :, offset].view(pool.dtype).float())  # [L, 2, Hkv, Dh]
            kv = torch.cat(parts)
            if spec.name.endswith(HIDDEN):
                out[spec.name] = kv.flatten(1)
                continue
            name = spec.name.removesuffix("kv_cache")
            out[f"{name}k"], out[f"{name}v"] = kv[:, 0].flatten(0, 1), kv[:, 1].flatten(0, 1)
        return out

    def recurrent_state(self, i: int) -> Tensor:  # [SEQUENCES, H, K, V] fp32
        """Pool i, a recurrent_state, with the tokens kept beside it applied."""
        beside = [s.name.endswith(BESIDE_STATE) for s in self.engine.specs[i + 1 : i + 3]]
        buffer, position = self.states[i + 1 : i + 3] if beside == [True, True] else (None, None)
        pool = self.states[i]
        slots = self.layout.slots.to(pool.device)
        held = torch.tensor(self.held, dtype=torch.int32, device=pool.device)
        return current_state(pool, buffer, position, slots, held, torch.float32)

    def overwritten(self) -> list[str]:
        """Pools of which an unused row has changed."""
        rows = zip(self.engine.specs, self._unused(), self.guards, strict=True)
        return [s.name for s, now, before in rows if not torch.equal(now, before)]


def random_prompts(config: JetNemotronConfig, tokens: int, seed: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (SEQUENCES, tokens), generator=rng).tolist()
