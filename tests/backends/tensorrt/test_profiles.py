"""The optimisation profiles hold every call that verify and the runtime make, whatever the limits."""

import pytest
import torch
from helpers.eager_bundle import eager_engine

from jet_export.backends.base import Engine
from jet_export.backends.tensorrt.profiles import NAMES, VERIFY_NAMES, shapes, sizes
from jet_export.bundle.limits import MAX_PREFILL_TOKENS, Limits
from jet_export.runtime.runner import Runner
from jet_export.runtime.verify_calls import invariant_size, verify_sizes
from jet_export.verify.trial import Layout, Trial, decode_step, prefill_step, random_prompts, scenarios

INPUTS: dict[str, list[int | str]] = {
    "input_ids": ["tokens"],
    "cu_seqlens": ["sequences + 1"],
    "slots": ["sequences"],
    "context_lens": ["sequences"],
    "block_table": ["sequences", "table_pages"],
    "window_block_table": ["sequences", "ring_pages"],
    "logit_indices": ["outputs"],
}


class Ranges(Engine):
    """Computes nothing; every shape must be in its profile."""

    def __init__(self, limits: Limits) -> None:
        eager = eager_engine(limits)
        self.config, self.limits, self.specs = eager.config, limits, eager.specs
        self.dtype, self.device = eager.dtype, eager.device
        pools: dict[str, list[int | str]] = {s.name: [s.rows, *s.shape] for s in self.specs}
        known = [sizes(self.config, limits, name) for name in NAMES]
        self.profiles = [shapes({**INPUTS, **pools}, k) for k in known]
        self.calls = [0, 0]

    def check(self, profile, input_ids, batch, rows, states) -> torch.Tensor:
        given = dict(zip(INPUTS, (input_ids, *batch, rows), strict=True))
        given |= {s.name: pool for s, pool in zip(self.specs, states, strict=True)}
        for name, tensor in given.items():
            low, likely, high = self.profiles[profile][name]
            assert all(a <= n <= b for a, n, b in zip(low, tensor.shape, high, strict=True)), (name, tensor.shape, high)
            assert all(a <= n <= b for a, n, b in zip(low, likely, high, strict=True)), (name, likely)
        self.calls[profile] += 1
        return torch.zeros(len(rows), self.config.vocab_size)

    def prefill(self, input_ids, batch, logit_indices, states):
        return self.check(0, input_ids, batch, logit_indices, states)

    def decode(self, input_ids, batch, states):
        return self.check(1, input_ids, batch, torch.arange(len(input_ids)), states)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_batch_size=1, max_seq_len=32, prefill_chunk=8),
        Limits(max_batch_size=2, max_seq_len=100, prefill_chunk=1),
        Limits(max_batch_size=16, max_seq_len=200, prefill_chunk=200),
        Limits(max_batch_size=4, max_seq_len=1024, prefill_chunk=512),
    ],
)
def test_every_call_fits(limits) -> None:
    engine = Ranges(limits)
    for scenario in scenarios(engine.config, limits):
        layout = Layout(
            engine.config, tokens=scenario.tokens, longest_call=scenario.longest_call, seed=0, device=engine.device
        )
        trial = Trial(engine, layout, random_prompts(engine.config, scenario.tokens, 0))
        for call in [c for stage in scenario.stages for c in stage.calls]:
            trial.step(call)
    for call in (decode_step(), prefill_step(limits)):
        trial.step(call)
    runner, n = Runner(engine), limits.max_batch_size
    tokens = [[1] * limits.prefill_chunk] * n
    assert sum(map(len, tokens)) <= MAX_PREFILL_TOKENS
    runner.prefill(list(range(n)), tokens)
    runner.reset(0)
    runner.prefill([0], tokens[:1], all_logits=True)
    runner.reset(0)
    runner.prefill([0], [[1]])
    runner.decode(list(range(n)), torch.ones(n, dtype=torch.int64))
    assert min(engine.calls) > 1


def test_a_table_wider_than_the_limits_is_outside() -> None:
    engine = Ranges(Limits(max_batch_size=1, max_seq_len=32, prefill_chunk=8))
    layout = Layout(engine.config, tokens=300, longest_call=8, seed=0, device=engine.device)
    with pytest.raises(AssertionError, match="block_table"):
        Trial(engine, layout, random_prompts(engine.config, 300, 0)).step(decode_step())


@pytest.mark.parametrize("rollback", [2, 5, 16])
def test_calls_that_verify_fit(rollback) -> None:
    """The sizes of captured calls, batch-invariant ones too, with their padding rows."""
    for n in (1, 4, 5, 33, 79):
        limits = Limits(max_batch_size=n, max_seq_len=32, prefill_chunk=16)
        known = sizes(eager_engine(limits).config, limits, *VERIFY_NAMES, rollback)
        for call in (*verify_sizes(n, rollback), invariant_size(n, rollback)):
            assert 1 <= call.rows <= known["sequences"][2] and 1 <= call.tokens <= known["tokens"][2], (n, call)
        assert known["outputs"] == known["tokens"] and all(a <= b <= c for a, b, c in known.values())
