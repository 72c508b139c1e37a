"""Qwen3.5's multi-token-prediction layer: against transformers' parts, and as a draft that changes no answer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.golden import Golden
from helpers.qwen import in_blocks, load_qwen

from jet_export.bundle.limits import Limits
from jet_export.kernels.form import Form
from jet_export.model.cache import PAGE, PackedBatch, allocate_states, state_specs
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.linear import normed
from jet_export.model.mtp import MultiTokenPredictor, own_config
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.mtp_draft import HiddenStateEngine, MtpDraft
from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError, JetExportWarning

VOCAB = 96
MOST = 3  # drafted tokens
LIMITS = Limits(max_batch_size=3, max_seq_len=PAGE, prefill_chunk=16)


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def checkpoint(directory: Path, **changes: Any) -> Path:
    """The golden model with its layer; `changes`: of its tensors, None: left out."""
    model, layer = load_qwen("qwen3_5"), load_qwen("qwen3_5_mtp")
    weights = {**model.weights, **layer.weights, **changes}
    kept = {k: v for k, v in weights.items() if v is not None}
    return Golden(model.config, [], kept, {}).save_checkpoint(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module")
def model(directory: Path) -> JetNemotronForCausalLM:
    with pytest.warns(JetExportWarning, match="left out: the multi-token-prediction layer"):
        return JetNemotronForCausalLM.from_pretrained(directory, torch.float32)


@pytest.fixture(scope="module")
def predictor(directory: Path, model: JetNemotronForCausalLM) -> MultiTokenPredictor:
    return MultiTokenPredictor.from_pretrained(directory, model)


@pytest.mark.parametrize("chunks", [[63], [1, 40, 1, 21]], ids=["whole", "split"])
def test_logits_are_those_of_transformers_parts(model, predictor, chunks: list[int]) -> None:
    ids, want = load_qwen("qwen3_5").input_ids, load_qwen("qwen3_5_mtp").outputs["logits"]
    cache, B = model.new_cache(*ids.shape), len(ids)
    step = model.forward_packed(ids.reshape(-1), cache.batch(64, None), cache.states, None, Form.PREFILL, True)
    hidden = normed(step.hidden_states[-1], model.norm).view(B, 64, -1)
    states = allocate_states(state_specs(predictor.config, torch.float32), {"pages": B}, torch.device("cpu"))
    table, found, first = torch.arange(B, dtype=torch.int32)[:, None], [], 0
    for n in chunks:
        rows = torch.arange(B, dtype=torch.int32)
        batch = PackedBatch(
            torch.arange(B + 1, dtype=torch.int32) * n, rows, torch.full_like(rows, first), table, table
        )
        part, after = hidden[:, first : first + n].flatten(0, 1), ids[:, first + 1 : first + n + 1].flatten()
        out = predictor(after, part, batch, states, Form.DECODE if n == 1 else Form.PREFILL)
        found.append(predictor.logits(out).view(B, n, -1))
        first += n
    assert relative_error(torch.cat(found, 1), want) < 1e-5


def answers(engine: HiddenStateEngine, proposer: MtpDraft | None, **serving: Any) -> tuple[list[list[int]], Any]:
    """Of five requests, of which three run at once; and the metrics of their drafts."""
    options = Serving(**{"prefix_cache_bytes": 0, **serving})
    one = BatchingEngine(engine, ByteTokenizer(), -1, options, proposer=proposer)
    if one.speculation:
        one.speculation.lengths.fixed = True  # as long as they may be, whatever they cost
    lengths, temperatures = (1, 2, 20, 33, 5), (0, 0, 0, 1, 1)
    cases = [
        (tokens(n, n), Params(11, Sampling(temperature=t, seed=n))) for n, t in zip(lengths, temperatures, strict=True)
    ]
    asked = [one.submit(prompt, params, lambda output: None) for prompt, params in cases]
    while one.step():
        pass
    return [list(s.tokens) for s in asked], one.metrics.drafts


def drafting(model: JetNemotronForCausalLM, predictor: MultiTokenPredictor) -> tuple[HiddenStateEngine, MtpDraft]:
    engine = HiddenStateEngine(model, LIMITS, rollback=MOST + 1)
    return engine, MtpDraft(engine, predictor, LIMITS.max_batch_size)


def test_drafts_of_the_layer_change_no_answer(model, predictor) -> None:
    engine, proposer = drafting(model, predictor)
    plain, _ = answers(engine, None)
    drafted, drafts = answers(engine, proposer)
    assert drafted == plain and sum(drafts.drafted) > 20
    assert not proposer.known  # ended sequences are forgotten


def test_a_layer_that_predicts_exactly_is_always_right(model, directory: Path) -> None:
    """A model whose layers add nothing knows the last token only; so does a layer that passes its embedding on."""
    with pytest.warns(JetExportWarning):
        again = JetNemotronForCausalLM.from_pretrained(directory, torch.float32)
    predictor = MultiTokenPredictor.from_pretrained(directory, again)
    with torch.no_grad():
        for layer in [*again.layers, predictor.layer]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        d = again.config.hidden_size
        predictor.fc.weight.copy_(torch.cat([torch.eye(d), torch.zeros(d, d)], 1))
        predictor.pre_fc_norm_embedding.weight.fill_(1)
        predictor.norm.weight.copy_(again.norm.weight)
    engine, proposer = drafting(again, predictor)
    plain, _ = answers(engine, None)
    drafted, drafts = answers(engine, proposer)
    assert drafted == plain and sum(drafts.accepted) == sum(drafts.drafted) > 30


def test_the_first_token_of_a_draft_is_the_layers_most_likely(model, predictor) -> None:
    """Drafts of a running sequence, beside the layer run over all of its tokens at once."""
    engine, proposer = drafting(model, predictor)
    made, draft = list[tuple[list[int], list[int]]](), proposer.draft

    def recorded(sequences, offers, draw):
        drafts = draft(sequences, offers, draw)
        for s, d in zip(sequences, drafts, strict=True):
            if s.params.sampling.temperature == 0 and len(s.prompt) < 30:
                made.append(([*s.prompt, *s.tokens[: s.position]], d))
        return drafts

    proposer.draft = recorded  # type: ignore[method-assign]
    answers(engine, proposer)
    assert len(made) > 12
    for ids, d in made[::4]:
        cache, T = model.new_cache(1, len(ids)), len(ids)
        batch = cache.batch(T, None)
        step = model.forward_packed(torch.tensor(ids), batch, cache.states, None, Form.PREFILL, True)
        hidden = normed(step.hidden_states[-1], model.norm)[:-1]
        states = allocate_states(
            state_specs(own_config(model.config), torch.float32), {"pages": 1}, torch.device("cpu")
        )
        pairs = batch._replace(cu_seqlens=torch.tensor([0, T - 1], dtype=torch.int32))
        out = predictor(torch.tensor(ids[1:]), hidden, pairs, states, Form.PREFILL)
        assert d[0] == int(predictor.logits(out)[-1].argmax())


def test_a_cached_prefix_has_no_hidden_states_and_is_not_drafted_for(model, predictor) -> None:
    engine, proposer = drafting(model, predictor)
    outcomes = []
    for drafts in (None, proposer):
        one = BatchingEngine(engine, ByteTokenizer(), -1, Serving(prefix_cache_bytes=1 << 24), proposer=drafts)
        if one.speculation:
            one.speculation.lengths.fixed = True
        prompt, made = tokens(30, 1), list[int]()
        for _ in range(2):  # the second turn begins as the first has ended
            asked = one.submit(prompt, Params(9), lambda output: None)
            while one.step():
                pass
            made.append(sum(one.metrics.drafts.drafted) if one.metrics.drafts else 0)
            prompt = [*prompt, *asked.tokens, 5, 6]
        outcomes.append((prompt, asked.cached_tokens))
    assert outcomes[0] == outcomes[1] and asked.cached_tokens == 38
    assert made[1] == made[0] > 0


def test_fp8_blocks_are_widened(model, predictor, tmp_path) -> None:
    name = "mtp.layers.0.mlp.down_proj.weight"
    codes, scales, wide = in_blocks(load_qwen("qwen3_5_mtp").weights[name], (48, 40))
    stored = checkpoint(tmp_path, **{name: codes, f"{name}_scale_inv": scales})
    config = load_qwen("qwen3_5").config
    quant = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 40], "activation_scheme": "dynamic"}
    (stored / "config.json").write_text(json.dumps({**config, "quantization_config": quant}))
    again = MultiTokenPredictor.from_pretrained(stored, model)
    assert torch.equal(again.layer.mlp.down_proj.weight, wide)
    assert torch.equal(again.fc.weight, predictor.fc.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp.fc.weight": None}, r"tensor mtp\.fc\.weight is missing"),
        ({"mtp.layers.1.mlp.up_proj.weight": torch.zeros(2)}, r"mtp\.layers\.1\.mlp\.up_proj\.weight is not known"),
        ({"mtp.fc.weight": torch.zeros(64, 64)}, r"mtp\.fc\.weight has shape \[64, 64\]"),
    ],
)
def test_what_is_not_run_is_refused(model, tmp_path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        MultiTokenPredictor.from_pretrained(checkpoint(tmp_path, **changes), model)
