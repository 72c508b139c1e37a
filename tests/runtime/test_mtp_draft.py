"""Drafts of a multi-token-prediction layer change no answer, and are what the layer says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mtp import checkpoint, make_exact, with_predictor

from jet_export import LLM
from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.kernels.form import Form
from jet_export.model.cache import PAGE, PackedBatch, allocate_states, mtp_spec, state_specs
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.mtp_draft import MtpDraft, pairs_of
from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

VOCAB = 96
MOST = 3  # drafted tokens
LIMITS = Limits(max_batch_size=3, max_seq_len=PAGE, prefill_chunk=16)


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module")
def model(directory: Path) -> JetNemotronForCausalLM:
    return with_predictor(directory)


def engine_of(model: JetNemotronForCausalLM, limits: Limits = LIMITS) -> EagerEngine:
    return EagerEngine(model, limits, rollback=MOST + 1)


def batching(engine: EagerEngine, speculate: str, **serving: Any) -> BatchingEngine:
    options = Serving(**{"prefix_cache_bytes": 0, **serving}, speculate=speculate)
    return eager_to_draft(BatchingEngine(engine, ByteTokenizer(), -1, options))


def eager_to_draft(one: BatchingEngine) -> BatchingEngine:
    """Drafts are as long as they may be, whatever they cost."""
    if one.speculation:
        one.speculation.lengths.fixed = True
    return one


def proposer_of(one: BatchingEngine) -> MtpDraft:
    assert one.speculation is not None and isinstance(one.speculation.proposer, MtpDraft)
    return one.speculation.proposer


def finish(one: BatchingEngine) -> None:
    while one.step():
        pass


def answers(one: BatchingEngine) -> list[list[int]]:
    """Of five requests, of which three run at once."""
    lengths, temperatures = (1, 2, 20, 33, 5), (0, 0, 0, 1, 1)
    asked = [
        one.submit(tokens(n, n), Params(11, Sampling(temperature=t, seed=n)), lambda output: None)
        for n, t in zip(lengths, temperatures, strict=True)
    ]
    finish(one)
    return [list(s.tokens) for s in asked]


@pytest.mark.parametrize("serving", [{}, {"deterministic": True}, {"token_budget": 4}], ids=str)
def test_drafts_change_no_answer(model, serving: dict[str, Any]) -> None:
    engine = engine_of(model)
    one = batching(engine, "mtp", **serving)
    assert answers(one) == answers(batching(engine, "off", **serving))
    assert one.metrics.drafts is not None and sum(one.metrics.drafts.drafted) > 20
    assert 'jet_drafted_position_total{position="3"}' in one.render_metrics()
    assert not proposer_of(one).known  # all forgotten


def test_a_layer_that_predicts_exactly_is_always_right(directory: Path) -> None:
    model = with_predictor(directory)
    make_exact(model)
    engine = engine_of(model)
    one = batching(engine, "mtp")
    assert answers(one) == answers(batching(engine, "off"))
    drafts = one.metrics.drafts
    assert drafts is not None and sum(drafts.accepted) == sum(drafts.drafted) > 30


def likely_draft(model: JetNemotronForCausalLM, ids: list[int], n: int) -> list[int]:
    """The layer's n most likely tokens behind these, each of a call of all pairs at once."""
    T = len(ids)
    specs = state_specs(model.config, torch.float32, hidden=True)
    states = allocate_states(specs, {"slots": 1, "pages": 1}, torch.device("cpu"))
    zero, table = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    batch = PackedBatch(torch.tensor([0, T], dtype=torch.int32), zero, zero, table, table)
    model.forward_packed(torch.tensor(ids), batch, states, None, Form.PREFILL)
    assert model.mtp is not None
    behind, hidden = list(ids[1:]), states[-1][0, 0, 0, : T - 1]
    for _ in range(n):
        (kv_cache,) = allocate_states([mtp_spec(model.config, torch.float32)], {"pages": 1}, torch.device("cpu"))
        pairs = batch._replace(cu_seqlens=torch.tensor([0, len(behind)], dtype=torch.int32))
        logits, ahead = model.mtp(torch.tensor(behind), hidden, pairs, None, kv_cache, Form.PREFILL)
        behind.append(int(logits[-1].argmax()))
        hidden = torch.cat([hidden, ahead[-1:]])
    return behind[T - 1 :]


def recorded(one: BatchingEngine) -> list[tuple[list[int], list[int]]]:
    """What is drafted behind which tokens, of greedy requests, as it is drafted."""
    made, proposer = list[tuple[list[int], list[int]]](), proposer_of(one)
    draft = proposer.draft

    def recording(sequences: Any, offers: Any, draw: Any) -> list[list[int]]:
        drafts = draft(sequences, offers, draw)
        for s, d in zip(sequences, drafts, strict=True):
            if d and s.params.sampling.temperature == 0:
                made.append(([*s.prompt, *s.tokens[: s.position]], d))
        return drafts

    proposer.draft = recording  # type: ignore[method-assign]
    return made


def test_a_draft_is_the_layers_most_likely(model) -> None:
    """In a running batch, whose prompts come in chunks."""
    one = batching(engine_of(model), "mtp")
    made = recorded(one)
    answers(one)
    assert len(made) > 12
    for ids, drafted in made[::4]:
        assert drafted == likely_draft(model, ids, len(drafted))


def test_a_cached_prefix_has_its_hidden_states(model) -> None:
    """They are kept by page, as its keys are: a second turn is drafted for as if it had no prefix."""
    one = batching(engine_of(model), "mtp", prefix_cache_bytes=1 << 24)
    first = one.submit(tokens(30, 1), Params(9), lambda output: None)
    finish(one)
    made = recorded(one)
    second = one.submit([*tokens(30, 1), *first.tokens, 5, 6], Params(9), lambda output: None)
    finish(one)
    assert second.cached_tokens == 38 and len(made) >= 2
    for ids, drafted in made:
        assert drafted == likely_draft(model, ids, len(drafted))


def test_prompts_longer_than_a_call_are_caught_up_with_in_several(model) -> None:
    """A draft bundle's and a layer's cache begin empty; until the pairs are fed there is no draft, and no wrong one."""
    limits = Limits(max_batch_size=2, max_seq_len=PAGE, prefill_chunk=8)
    one, plain = (batching(engine_of(model, limits), mode) for mode in ("mtp", "off"))
    made = recorded(one)
    asked = [[e.submit(tokens(n, n), Params(20), lambda output: None) for n in (50, 61)] for e in (one, plain)]
    finish(one)
    finish(plain)
    assert [s.tokens for s in asked[0]] == [s.tokens for s in asked[1]]
    assert made and min(len(ids) for ids, _ in made) > 52  # the first steps had none
    for ids, drafted in made[::3]:
        assert drafted == likely_draft(model, ids, len(drafted))


def test_a_session_goes_on_with_its_hidden_states(model, tmp_path) -> None:
    llm = LLM.over(engine_of(model), ByteTokenizer(), -1, fingerprint="mtp", speculate="mtp")
    plain = LLM.over(engine_of(model), ByteTokenizer(), -1, fingerprint="mtp")
    eager_to_draft(llm.batching)
    texts = []
    for one in (llm, plain):
        one.save_session(one.session(tokens(21, 3)), tmp_path / "session")
        session = one.load_session(tmp_path / "session")
        texts.append([one.generate([[7]], 9, session=session)[0].token_ids for _ in range(2)])
    made = recorded(llm.batching)
    llm.generate([[7, 9]], 6, session=llm.load_session(tmp_path / "session"))
    assert texts[0] == texts[1]
    for ids, drafted in made:
        assert drafted == likely_draft(model, ids, len(drafted))
    assert made


def test_a_bundle_without_the_layer_is_refused(model, directory: Path) -> None:
    bare = EagerEngine(JetNemotronForCausalLM.from_pretrained(directory, torch.float32, mtp=True), LIMITS, rollback=4)
    with pytest.raises(
        JetExportError, match=r"speculate mtp: the bundle has no multi-token-prediction layer.*\n.*--mtp"
    ):
        batching(bare, "mtp")
    with pytest.raises(JetExportError, match="has no multi-token-prediction layer"):
        bare.predict(torch.zeros(1), torch.zeros(1), None, None, torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(JetExportError, match="verifies no drafts"):
        batching(EagerEngine(model, LIMITS), "mtp")
    assert pairs_of(batching(engine_of(model), "off").submit([1, 2], Params(1), lambda output: None)) == 1
