"""runtime/scoring.py: which tokens a call takes, and that no call has more logits than its bound."""

import pytest
import torch
from helpers.eager_bundle import eager_engine
from hypothesis import given
from hypothesis import strategies as st

from jet_export.bundle.limits import Limits
from jet_export.runtime import scoring
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.params import Logprob, Params
from jet_export.runtime.scoring import BLOCK, call_tokens, calls
from jet_export.runtime.sequence import OnOutput
from jet_export.runtime.tokenizer import ByteTokenizer


@given(st.lists(st.integers(0, 700), max_size=9), st.integers(1, 700), st.booleans())
def test_every_token_runs_once_in_order_and_no_call_is_too_large(lengths, most, alone) -> None:
    at = [0] * len(lengths)
    for call in calls(lengths, most, alone=alone):
        assert 0 < sum(n for _, _, n in call) <= most
        assert len({i for i, _, _ in call}) == len(call)
        assert not alone or len(call) == 1
        for i, first, n in call:
            assert first == at[i] and n > 0
            at[i] += n
    assert at == lengths


@given(st.lists(st.integers(1, 700), min_size=1, max_size=9), st.integers(1, 8))
def test_a_sequence_is_cut_between_blocks_only(lengths, blocks) -> None:
    for call in calls(lengths, blocks * BLOCK):
        assert all(first % BLOCK == 0 for _, first, _ in call)


def test_chunks_advance_together() -> None:
    assert list(calls([256, 256, 100], 384)) == [
        [(0, 0, 128), (1, 0, 128), (2, 0, 100)],
        [(0, 128, 128), (1, 128, 128)],
    ]


def test_alone_a_call_does_not_depend_on_the_others() -> None:
    together = [c for c in calls([300, 70, 200], 128, alone=True) if c[0][0] == 2]
    assert [[(0, at, n) for _, at, n in c] for c in together] == list(calls([200], 128, alone=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_prompts_of_one_step_have_the_log_probabilities_of_one_forward_pass(monkeypatch, deterministic) -> None:
    """Different numbers of most likely tokens in one call; the prompts take several calls."""
    from jet_export.runtime.capacity import Serving
    from jet_export.runtime.runner import Runner

    limits = Limits(max_batch_size=4, max_seq_len=256, prefill_chunk=128)
    engine = eager_engine(limits)
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 100 * engine.config.vocab_size * 4)
    batching = BatchingEngine(engine, ByteTokenizer(), -1, Serving(deterministic=deterministic))
    assert call_tokens(batching.runner) == BLOCK
    prompts = [[(3 * i * i + n) % 128 for i in range(n)] for n in (150, 2, 1, 90)]
    found: dict[int, tuple[Logprob, ...]] = {}

    def take(i: int) -> OnOutput:
        return lambda output: found.__setitem__(i, output.prompt_logprobs)

    for i, prompt in enumerate(prompts):
        batching.submit(prompt, Params(1, prompt_logprobs=i), take(i), text=False)
    while batching.step():
        pass
    for i, prompt in enumerate(prompts):
        rows = Runner(eager_engine(Limits(max_batch_size=1, max_seq_len=256, prefill_chunk=256)))
        expected = rows.prefill([0], [prompt], all_logits=True).log_softmax(-1)[:-1]
        chosen = expected.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0]
        assert [p.chosen for p in found[i]] == pytest.approx(chosen.tolist(), abs=1e-4)
        best = expected.topk(max(i, 1)).values[:, :i]
        assert [[v for _, v in p.top] for p in found[i]] == [pytest.approx(row, abs=1e-4) for row in best.tolist()]
