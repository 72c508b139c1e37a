"""The stage of a multi-token-prediction layer: its logits, and the hidden states that it goes on with.

Pairs of noise in the place of hidden states and of random tokens, which are a prompt's, then one at a time; each call
beside a padding row. The model's own hidden states are compared with its other states (parity.py).
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.eager import EagerEngine
from jet_export.model.cache import PackedBatch, mtp_spec
from jet_export.verify.parity import StageResult, measure, unit_roundoff

STAGE = "multi-token prediction"
STEPS = 3  # calls of one pair a sequence
PAGES = 9


def mtp_stage(engine: Engine, eager: EagerEngine, reference: EagerEngine, seed: int) -> StageResult:
    """Compare the engines on the same pairs."""
    chunk = min(eager.limits.prefill_chunk, eager.limits.max_seq_len - STEPS, 40)
    calls = [[chunk, 1, max(1, chunk // 2), 2], *([[1] * 4] * STEPS)]
    results = [outputs(e, eager.dtype, calls, seed) for e in (engine, eager, reference)]
    u = unit_roundoff(eager.dtype)
    logits, hidden = ([r[i] for r in results] for i in range(2))
    measures = [measure(STAGE, "logits", logits, u, u), measure(STAGE, "mtp.hidden", hidden, u, u)]
    return StageResult(STAGE, sum(map(sum, calls)), measures, [f for m in measures for f in m.failures()])


def outputs(engine: Engine, dtype: torch.dtype, calls: list[list[int]], seed: int) -> tuple[Tensor, Tensor]:
    """Logits and hidden states of all pairs, in fp32. `dtype`: that of the hidden states given; `calls`: the pairs of
    four rows, the third of which is padding."""
    device, config, rng = engine.device, engine.config, torch.Generator().manual_seed(seed)
    spec, found, held = mtp_spec(config, engine.dtype), [], [0] * 4
    kv_cache = torch.randn(PAGES, *spec.shape, generator=rng).to(device, spec.dtype)
    table = torch.randperm(PAGES, generator=rng)[:8].view(4, 2).int().to(device)
    for lens in calls:
        ends = list(accumulate(lens, initial=0))
        ids = torch.randint(config.vocab_size, (ends[-1],), generator=rng)
        hidden = torch.randn(len(ids), config.hidden_size, generator=rng).to(dtype)
        live = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in (0, 1, 3)])
        integers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (ends, [2, 0, -1, 1], held)]
        batch = PackedBatch(integers[0], integers[1], integers[2], table, table)
        decodes = max(lens) == 1
        out = engine.predict(
            ids.to(device), hidden.to(device, engine.dtype), batch, None if decodes else live.int().to(device), kv_cache
        )
        found.append([x.float()[live.to(device)] if decodes else x.float() for x in out])
        held = [h + n for h, n in zip(held, lens, strict=True)]
    return torch.cat([x for x, _ in found]), torch.cat([x for _, x in found])
