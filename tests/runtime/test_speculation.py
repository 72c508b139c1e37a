"""Drafts change no answer: with any proposer, a hostile one included, requests have the tokens of plain decoding."""

import random
from collections.abc import Iterator

import pytest
import torch
from helpers.batching import require_placeless_rows, tokens
from helpers.eager_bundle import eager_engine, mini_config

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.model.jet_nemotron import random_model
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.draft_model import DraftModel
from jet_export.runtime.drafts import LookupProposer, Proposer
from jet_export.runtime.params import Logprob, Output, Params
from jet_export.runtime.prompt_lookup import Match
from jet_export.runtime.replay import ReplayProposer
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=3 * PAGE, prefill_chunk=64)
MOST = 4  # drafted tokens


@pytest.fixture(scope="module")
def engine(device) -> EagerEngine:
    model = eager_engine(LIMITS, device=device).model
    return EagerEngine(model, LIMITS, state_interval=3, rollback=MOST + 1)


class Garbage:
    """Drafts at random: any tokens, of any length."""

    guesses = True

    def __init__(self) -> None:
        self.rng = random.Random(0)

    def forget(self, sequence: RunningSequence) -> None:
        pass

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        return Match([self.rng.randrange(128) for _ in range(self.rng.randint(0, most))], 0)

    def draft(self, sequences, offers, draw) -> list[list[int]]:
        return [offer.tokens for offer in offers]


def batching(engine: EagerEngine, proposer: Proposer | None, *, eos: int = -1, overlap=False, **serving):
    """With as many drafts as there can be, whatever they cost."""
    values = {"prefix_cache_bytes": 0, **serving}
    made = BatchingEngine(engine, ByteTokenizer(), eos, Serving(**values), overlap=overlap, proposer=proposer)
    if made.speculation:
        made.speculation.lengths.fixed = True
    return made


def hot(seed: int, new: int, **changes) -> Params:
    return Params(new, Sampling(temperature=0.9, top_p=0.95, seed=seed), **changes)


def finish(engine: BatchingEngine) -> None:
    while engine.step():
        pass
    s = engine.scheduler
    assert s.slots.used == s.window_pages.used == 0 and not s.waiting and not engine.sequences
    assert engine.speculation is None or not engine.speculation.histories
    if engine.speculation and isinstance(engine.speculation.proposer, LookupProposer):
        assert not engine.speculation.proposer.indexes


def ask(engine: BatchingEngine, prompt: list[int], params: Params, **options) -> tuple[RunningSequence, list[Output]]:
    heard: list[Output] = []
    return engine.submit(prompt, params, heard.append, **options), heard


REPEATS = [7, 8, 9, 10] * 10
CASES = [
    (REPEATS, Params(18)),
    (REPEATS, hot(1, 14)),
    (tokens(70, 1), hot(2, 15, logprobs=3)),
    (tokens(PAGE - 5, 2), hot(3, 20, stop_ids=(3, 50, 90))),
    (tokens(9, 3), hot(4, 12, min_tokens=6, stop_ids=tuple(range(20)))),
    (REPEATS, hot(5, 14, logit_bias=((8, 4.0), (9, 4.0)))),
    (REPEATS, hot(6, 10, repetition_penalty=1.2, frequency_penalty=0.3)),
    (tokens(5, 4), hot(7, 1)),
    (tokens(30, 5), hot(8, 16, stop=("a", "q"))),
    (REPEATS, hot(9, 14, ignore_eos=True)),
]
EOS = 11


def proposers(recorded: list[RunningSequence]) -> Iterator[Proposer]:
    yield LookupProposer()
    yield Garbage()
    for acceptance in (1.0, 0.7):
        yield ReplayProposer(recorded, acceptance, 128)


@pytest.fixture(scope="module", params=[False, True], ids=["", "deterministic"])
def plain(request, engine) -> tuple[bool, list[tuple[RunningSequence, list[Output]]]]:
    """Whether it is deterministic, and the answers to CASES without drafts."""
    if request.param:
        require_placeless_rows(engine.model, 30)
    one = batching(engine, None, eos=EOS, deterministic=request.param)
    answers = [ask(one, *case) for case in CASES]
    finish(one)
    return request.param, answers


def same(a: list[Output], b: list[Output]) -> None:
    """But for the rounding of log probabilities."""
    assert [(o.token, o.text, o.finish_reason) for o in a] == [(o.token, o.text, o.finish_reason) for o in b]
    for x, y in zip(a, b, strict=True):
        assert (x.logprob is None) == (y.logprob is None)
        if isinstance(x.logprob, Logprob) and isinstance(y.logprob, Logprob):
            assert x.logprob.chosen == pytest.approx(y.logprob.chosen, abs=1e-4)
            assert [v for _, v in x.logprob.top] == pytest.approx([v for _, v in y.logprob.top], abs=1e-4)


@pytest.mark.parametrize("which", range(4), ids=["lookup", "garbage", "right", "mostly right"])
def test_any_proposer_gives_the_outputs_of_plain_decoding(engine, plain, which: int) -> None:
    """Requests of every kind together, arriving and cancelled at any step, with overlap scheduling and without."""
    deterministic, answers = plain
    proposer = list(proposers([s for s, _ in answers]))[which]
    crowd = batching(engine, proposer, eos=EOS, overlap=which % 2 == deterministic, deterministic=deterministic)
    rng, running = random.Random(which), {}
    for i in rng.sample(range(len(CASES)), len(CASES)):
        running[i] = ask(crowd, *CASES[i])
        for _ in range(rng.choice([0, 1, 5])):
            crowd.step()
    gone = rng.choice(list(running))
    crowd.cancel(running[gone][0])
    finish(crowd)
    drafts = crowd.metrics.drafts
    assert drafts is not None and sum(drafts.drafted) > 10
    for i, (sequence, heard) in running.items():
        if i == gone and sequence.finish_reason == "cancelled":
            assert sequence.tokens == answers[i][0].tokens[: len(sequence.tokens)]
        else:
            same(heard, answers[i][1])
    if which == 2:
        assert crowd.metrics.steps < sum(len(s.tokens) for s, _ in answers) / 4
        assert sum(drafts.accepted) == sum(drafts.drafted)


def test_deterministic_bits_do_not_depend_on_drafts_or_neighbours(engine, monkeypatch) -> None:
    """And every verifying call has one shape: the rows and tokens of the bundle's limits."""
    require_placeless_rows(engine.model, 30)
    shapes, verify = [], engine.verify

    def recorded(ids, batch, *rest):
        shapes.append((len(ids), len(batch.slots)))
        return verify(ids, batch, *rest)

    monkeypatch.setattr(engine, "verify", recorded)
    cases = [(REPEATS, hot(1, 14)), (tokens(40, 1), Params(9))]
    bits = set()
    for proposer in (Garbage(), LookupProposer()):
        for neighbours in (0, 2):
            one = batching(engine, proposer, deterministic=True)
            for i in range(neighbours):
                ask(one, tokens(20 + i, i), hot(i, 9))
            asked = [ask(one, *case, keep_logits=True)[0] for case in cases]
            finish(one)
            bits.add(tuple((tuple(s.tokens), torch.stack(s.logits).numpy().tobytes()) for s in asked))
    assert len(bits) == 1 and set(shapes) == {(LIMITS.max_batch_size * (MOST + 2), 2 * LIMITS.max_batch_size)}


def test_a_session_cut_inside_a_draft_goes_on_as_if_uncut(engine) -> None:
    """Its states are those of plain verifying, whatever was drafted and taken back, and so are its forks'."""
    require_placeless_rows(engine.model, 30)
    answers, states = set(), []
    for proposer in (Garbage(), LookupProposer()):
        one = batching(engine, proposer, deterministic=True)
        first, _ = ask(one, REPEATS, hot(1, 13), keep="end")
        finish(one)
        assert first.snapshot is not None and first.snapshot.held == len(REPEATS) + 12
        states.append({name: x.clone() for name, x in first.snapshot.states.items()})
        forks = [ask(one, [], hot(2, 9), start=first.snapshot, keep="end")[0] for _ in range(2)]
        more, _ = ask(one, tokens(5, 6), hot(3, 9), start=first.snapshot)
        finish(one)
        answers.add((*first.tokens, -1, *forks[0].tokens, -1, *more.tokens))
        assert forks[0].tokens == forks[1].tokens
    whole, _ = ask(one := batching(engine, LookupProposer(), deterministic=True), REPEATS, hot(1, 22))
    finish(one)
    assert len(answers) == 1 and whole.tokens[:13] == first.tokens
    written = [name for name in states[0] if name.endswith("state_position")]
    assert written
    for name, x in states[0].items():
        if name.endswith(("conv_state", "kv_cache")):
            assert torch.equal(x, states[1][name]), name


def test_a_turn_is_cached_with_the_tokens_that_it_has(engine) -> None:
    """The prefix cache's entry at the end of an answer, which ends inside a draft that was right."""
    outcomes = []
    for proposer in (None, LookupProposer()):
        one = batching(engine, proposer, prefix_cache_bytes=1 << 24)
        first, _ = ask(one, REPEATS, Params(23))
        finish(one)
        turn, _ = ask(one, [*REPEATS, *first.tokens, 5, 6], Params(9))
        finish(one)
        outcomes.append((first.tokens, turn.tokens, turn.cached_tokens))
    assert outcomes[0] == outcomes[1] and outcomes[0][2] == len(REPEATS) + 22


def test_states_of_an_odd_number_of_heads_are_cached_and_preempted(device) -> None:
    """Their rows are no whole 64-bit words."""
    jet = {
        "conv_size": 4,
        "dconv_generator_reduction": 8,
        "expand_v": 2,
        "head_dim": 32,
        "norm_eps": 1e-5,
        "num_heads": 3,
    }
    swa = {"window_size": 24}
    config = mini_config(efficient_attention_config={"jet": {**jet, "mode": "chunk"}, "swa": swa})
    model = random_model(config, torch.float32, device, max_positions=LIMITS.max_seq_len)
    odd = EagerEngine(model, LIMITS, rollback=MOST + 1)
    assert any(spec.row_bytes % 8 for spec in odd.specs)
    one = batching(odd, LookupProposer(), prefix_cache_bytes=1 << 22, kv_tokens=3 * PAGE, host_cache_bytes=1 << 26)
    alone = batching(odd, None)
    asked = [(tokens(PAGE - 3 * i, i), hot(i, 12)) for i in range(2)]
    asked.append((tokens(20, 7), Params(6)))
    results = []
    for made in (one, alone):
        running = [ask(made, *case)[0] for case in asked]
        finish(made)
        turn, _ = ask(made, [*asked[2][0], *running[2].tokens, 5], hot(1, 6))
        finish(made)
        results.append([s.tokens for s in (*running, turn)])
    assert results[0] == results[1] and one.metrics.prefix_hits > 0


@pytest.mark.parametrize(("deterministic", "host"), [(False, 1 << 26), (True, 0)], ids=["kept", "recomputed"])
def test_preempted_requests_have_the_tokens_that_they_have_alone(engine, deterministic: bool, host: int) -> None:
    if deterministic:
        require_placeless_rows(engine.model, 30)
    asked = [(tokens(PAGE - 3 * i, i), hot(i, 16)) for i in range(4)]
    results = []
    for proposer in (None, Garbage() if deterministic else LookupProposer()):
        pages = {"kv_tokens": 5 * PAGE, "host_cache_bytes": host} if proposer else {}
        one = batching(engine, proposer, deterministic=deterministic, **pages)
        running = [ask(one, *case)[0] for case in asked]
        finish(one)
        assert (one.metrics.memory.preemptions > 0) == (proposer is not None)
        results.append([s.tokens for s in running])
    assert results[0] == results[1]


def test_what_became_of_drafts_is_counted(engine) -> None:
    one = batching(engine, None)
    sequence, _ = ask(one, REPEATS, hot(1, 21))
    finish(one)
    assert "jet_drafted" not in one.render_metrics()
    again = batching(engine, ReplayProposer([sequence], 1.0, 128))
    ask(again, REPEATS, hot(1, 21))
    finish(again)
    text = again.render_metrics()  # 1 of the prompt, then 5 a step
    assert "jet_drafted_tokens_total 16\n" in text and "jet_accepted_tokens_total 16\n" in text
    assert 'jet_drafted_position_total{position="4"} 4\n' in text
    assert 'jet_accepted_position_total{position="4"} 4\n' in text
    assert "jet_tokens_total 21\n" in text


def test_a_failing_proposer_ends_its_requests_only(engine, monkeypatch) -> None:
    one = batching(engine, LookupProposer())
    _, heard = ask(one, REPEATS, Params(20))
    one.step()
    with monkeypatch.context() as patched:
        patched.setattr(LookupProposer, "offer", lambda *_: 1 / 0)
        one.step()
    assert heard[-1].finish_reason == "error" and isinstance(one.failure, ZeroDivisionError)
    healthy, _ = ask(one, REPEATS, Params(20))
    finish(one)
    assert healthy.finish_reason == "length"


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"speculate": "magic"}, "speculate is 'magic'"),
        ({"speculate": "mtp"}, "speculate mtp: the bundle has no multi-token-prediction layer"),
        ({"drafts": 2}, "drafts without speculate"),
        ({"speculate": "lookup", "drafts": MOST + 1}, f"the bundle verifies 1 to {MOST}"),
        ({"speculate": "lookup", "drafts": 0}, "drafts is 0"),
    ],
)
def test_bad_options_are_refused(engine, serving: dict, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        batching(engine, None, **serving)


def test_a_bundle_that_verifies_nothing_is_refused() -> None:
    with pytest.raises(JetExportError, match="verifies no drafts"):
        batching(eager_engine(LIMITS), None, speculate="lookup")


def test_a_draft_model_changes_no_answer(engine) -> None:
    """One that agrees always, being the model itself, and one that does not; a prompt longer than its chunks."""
    asked = [(tokens(70, 1), hot(1, 12)), (REPEATS, Params(9)), (tokens(9, 2), hot(2, 9)), (REPEATS, hot(3, 4))]
    narrow = Limits(max_batch_size=4, max_seq_len=3 * PAGE, prefill_chunk=32)
    itself = EagerEngine(engine.model, narrow)
    other = eager_engine(narrow, seed=1, device=engine.device)
    results, accepted = [], []
    for draft in (None, itself, other):
        proposer = DraftModel(draft, 4) if draft else None
        one = batching(engine, proposer)
        running = [ask(one, *case)[0] for case in asked]
        for _ in range(9):
            one.step()
        running.append(ask(one, *asked[0])[0])
        finish(one)
        results.append([s.tokens for s in running])
        if one.metrics.drafts and one.speculation:
            assert isinstance(one.speculation.proposer, DraftModel) and not one.speculation.proposer.known
            accepted.append(sum(one.metrics.drafts.accepted) / sum(one.metrics.drafts.drafted))
    assert results[0] == results[1] == results[2]
    assert accepted[0] == 1 and accepted[1] < 0.9


def test_a_draft_model_for_fewer_sequences_is_refused(engine) -> None:
    with pytest.raises(JetExportError, match="max_batch_size is 2; 4 sequences"):
        DraftModel(eager_engine(Limits(max_batch_size=2, max_seq_len=PAGE, prefill_chunk=32)), 4)
