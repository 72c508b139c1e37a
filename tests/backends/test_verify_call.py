"""The eager engine's call that verifies drafts, and states written every few tokens, give plain decoding's logits."""

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.eager_tiny import LIMITS, model
from helpers.faults import DraftsKept, other_rounding
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import PackedBatch, allocate_states
from jet_export.model.jet_nemotron import random_model
from jet_export.utils.errors import JetExportError
from jet_export.verify.verify import verify_engines

N, PAGES = 2, 2


def i32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Session:
    """Two sequences over an engine's own pools."""

    def __init__(self, interval: int, rollback: int) -> None:
        self.engine = EagerEngine(model(), LIMITS, state_interval=interval, rollback=rollback)
        rows = {"slots": N, "pages": N * PAGES, "window_pages": N * PAGES}
        self.states = allocate_states(self.engine.specs, rows, torch.device("cpu"))
        self.context = [0, 0]

    def call(self, name: str, tokens: list[list[int]], kept: list[int] | None = None) -> list[Tensor]:
        """Logits of each sequence's tokens, of the last one in prefill. `kept`: the tokens that stay; all."""
        lens = [len(t) for t in tokens]
        ends = [0, lens[0], sum(lens)]
        table = torch.arange(N * PAGES, dtype=torch.int32).view(N, PAGES)
        batch = PackedBatch(i32(ends), i32([1, 0]), i32(self.context), table, table)
        ids = torch.tensor([i for t in tokens for i in t])
        if name == "prefill":
            logits = self.engine.prefill(ids, batch, i32([e - 1 for e in ends[1:]]), self.states)
            lens = [1, 1]
        else:
            logits = getattr(self.engine, name)(ids, batch, self.states)
        self.context = [c + k for c, k in zip(self.context, kept or [len(t) for t in tokens], strict=True)]
        return list(logits.split(lens))


PROMPT = [[5, 9, 3, 17, 4], [8, 2]]


@pytest.mark.parametrize("interval, rollback", [(1, 4), (3, 4), (8, 2)])
def test_verified_tokens_have_the_logits_of_plain_decoding(interval, rollback):
    plain, drafts = Session(1, 0), Session(interval, rollback)
    for a, b in zip(plain.call("prefill", PROMPT), drafts.call("prefill", PROMPT), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    known = [[7, 30, 12, 6, 40, 41], [11, 3, 3, 25, 6, 9]]
    want: list[list[Tensor]] = [[], []]  # logits after each known token
    for t in range(6):
        for n, logits in enumerate(plain.call("decode", [[known[0][t]], [known[1][t]]])):
            want[n].append(logits[0])
    at = [0, 0]
    for kept in ([1, 2], [2, 1], [1, 1], [2, 2]):
        wrong = [900 + at[0], 901]
        tokens = [(known[n][at[n] : at[n] + kept[n]] + wrong)[:rollback] for n in range(N)]
        got = drafts.call("verify", tokens, kept)
        for n in range(N):
            for i in range(kept[n]):
                assert torch.allclose(got[n][i], want[n][at[n] + i], rtol=1e-3, atol=1e-3)
            at[n] += kept[n]


def test_an_engine_without_rollback_has_no_such_call():
    with pytest.raises(JetExportError, match="no call that verifies drafts"):
        Session(4, 0).call("verify", PROMPT)


def test_verification_has_a_stage_of_drafts_and_notices_those_that_stay():
    mini = random_model(mini_config(), torch.float32, max_positions=128)
    eager = EagerEngine(mini, Limits(max_batch_size=4, max_seq_len=128, prefill_chunk=64), state_interval=3, rollback=4)
    stages = list(verify_engines(other_rounding(eager), eager))
    assert not [f for s in stages for f in s.failures] and "verify drafts" in [s.name for s in stages]
    faulty = [s.name for s in verify_engines(DraftsKept(eager), eager) if s.failures]
    assert faulty and faulty[0] == "verify drafts"
