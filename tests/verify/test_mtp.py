"""What `verify` sees of a multi-token-prediction layer, and of the hidden states that are kept for it."""

from typing import Any

import pytest
import torch
from helpers.mtp import checkpoint, with_predictor
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.verify.mtp import STAGE, mtp_stage
from jet_export.verify.parity import reference_engine
from jet_export.verify.verify import verify_engines

LIMITS = Limits(max_batch_size=4, max_seq_len=64, prefill_chunk=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> JetNemotronForCausalLM:
    return with_predictor(checkpoint(tmp_path_factory.mktemp("mtp")))


class Forgetful(EagerEngine):
    """Of a draft's later tokens the layer sees nothing before them."""

    def predict(self, ids: Any, hidden: Any, batch: Any, logit_indices: Any, kv_cache: Any) -> tuple[Tensor, Tensor]:
        held = batch.context_lens if logit_indices is not None else torch.zeros_like(batch.context_lens)
        return super().predict(ids, hidden, batch._replace(context_lens=held), logit_indices, kv_cache)


class Rounded(EagerEngine):
    """Its outputs are in bfloat16."""

    def predict(self, *args: Any) -> tuple[Tensor, Tensor]:
        logits, hidden = super().predict(*args)
        return logits.bfloat16().float(), hidden


class Misplaced(EagerEngine):
    """Every call keeps the hidden states one token too far."""

    def step(self, ids: Any, batch: Any, states: list[Tensor], *rest: Any) -> Tensor:
        logits = super().step(ids, batch, states, *rest)
        states[-1].copy_(states[-1].roll(1, 3))
        return logits


@pytest.mark.parametrize(("kind", "passes"), [(EagerEngine, True), (Forgetful, False), (Rounded, False)])
def test_the_layers_stage(model, kind: type[EagerEngine], passes: bool) -> None:
    eager = EagerEngine(model, LIMITS, rollback=3)
    result = mtp_stage(kind(model, LIMITS, rollback=3), eager, reference_engine(eager), 0)
    assert result.name == STAGE and (not result.failures) is passes


@pytest.mark.parametrize("kind", [EagerEngine, Misplaced])
def test_kept_hidden_states_are_compared(model, kind: type[EagerEngine]) -> None:
    stages = list(verify_engines(kind(model, LIMITS, rollback=3), EagerEngine(model, LIMITS, rollback=3)))
    failures = [f for s in stages for f in s.failures]
    assert STAGE in [s.name for s in stages]
    if kind is EagerEngine:
        assert not failures
    else:
        assert failures and all("layers.3.hidden_states" in f for f in failures)
