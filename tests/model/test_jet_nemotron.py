"""Laws of the model: any split of a sequence gives the same logits, rows are independent, padding is inert."""

import math
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.golden import DATA, MINI_NAMES, load_golden

from jet_export.model.cache import PAGE, pages_per_sequence
from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.utils.errors import JetExportError

TOLERANCE = 2e-5  # fp32; chunked and recurrent forms round differently


@pytest.fixture(scope="module")
def config() -> JetNemotronConfig:
    return JetNemotronConfig.from_dict(load_golden(DATA / MINI_NAMES[1]).config)


@pytest.fixture(scope="module")
def model(config, device) -> JetNemotronForCausalLM:
    return random_model(config, torch.float32, device, seed=1)


def tokens(config: JetNemotronConfig, batch: int, length: int, device, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, length), generator=rng).to(device)


def run(model, ids: torch.Tensor, split: list[int], prefill_chunk: int | None = None) -> torch.Tensor:
    cache = model.new_cache(ids.shape[0], ids.shape[1], prefill_chunk)
    parts, start = [], 0
    for n in split:
        parts.append(model(ids[:, start : start + n], cache=cache))
        start += n
    assert start == ids.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("split", [[1] * 70, [2, 3, 1, 64], [3, 3, 64], [65, 5], [1, 69], [40, 1, 2, 27]])
def test_any_split_gives_the_logits_of_the_whole(model, config, device, split: list[int]) -> None:
    ids = tokens(config, 2, sum(split), device)
    assert relative_error(run(model, ids, split), run(model, ids, [sum(split)])) <= TOLERANCE


def test_window_ring_gives_the_logits_of_unbounded_pages(model, config, device) -> None:
    """Long enough that the ring of the sliding-window layers is overwritten several times."""
    length, chunk = 7 * PAGE, PAGE // 2
    ids = tokens(config, 1, length, device)
    split = [chunk] * (length // chunk)
    pages, ring = pages_per_sequence(config, length, chunk)
    assert ring < pages
    assert relative_error(run(model, ids, split, prefill_chunk=chunk), run(model, ids, [length])) <= TOLERANCE


def test_rows_of_a_batch_are_independent(model, config, device) -> None:
    ids = tokens(config, 3, 40, device)
    together = model(ids)
    for i in range(3):
        assert relative_error(together[i : i + 1], model(ids[i : i + 1])) <= TOLERANCE


def test_left_padded_batch_equals_its_sequences_one_by_one(model, config, device) -> None:
    lengths, width = [5, 70, 1, 33], 70
    ids = tokens(config, len(lengths), width + 3, device)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64, device=device)
    for i, n in enumerate(lengths):
        mask[i, width - n :] = 1
    cache = model.new_cache(len(lengths), width + 3)
    prefill = model(ids[:, :width], cache=cache, attention_mask=mask)
    decode = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(width, width + 3)], 1)
    for i, n in enumerate(lengths):
        alone = run(model, ids[i : i + 1, width - n :], [n, 1, 1, 1])
        assert relative_error(prefill[i, width - n :], alone[0, :n]) <= TOLERANCE
        assert relative_error(decode[i], alone[0, n:]) <= TOLERANCE
        assert prefill[i, : width - n].abs().sum() == 0


@pytest.mark.parametrize("state", ["recurrent_state", "conv_state", "kv_cache"])
def test_carried_states_matter(model, config, device, state: str) -> None:
    """Zeroing one kind of state between two calls moves the logits."""
    from jet_export.model.cache import state_specs

    ids = tokens(config, 1, 80, device)
    cache = model.new_cache(1, 80)
    model(ids[:, :64], cache=cache)
    for spec, pool in zip(state_specs(config, model.dtype), cache.states, strict=True):
        if spec.name.endswith(state):
            pool.zero_()
    faulty = model(ids[:, 64:], cache=cache)
    assert relative_error(faulty, run(model, ids, [64, 16])[:, 64:]) > 1e-3


def test_a_new_sequence_ignores_what_its_slot_held(model, config, device) -> None:
    ids = tokens(config, 1, 20, device)
    cache = model.new_cache(1, 40)
    for pool in cache.states:
        pool.fill_(float("nan"))
    assert relative_error(model(ids, cache=cache), model(ids)) <= TOLERANCE


def test_compiles_whole_and_does_not_recompile_between_decode_steps(config) -> None:
    model = random_model(config, torch.float32, "cpu", seed=1)
    ids = tokens(config, 2, 24, "cpu")
    expected = run(model, ids, [16] + [1] * 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = model.new_cache(2, 24)
    out = [compiled(ids[:, :16], cache=cache), compiled(ids[:, 16:17], cache=cache)]
    with torch.compiler.set_stance("fail_on_recompile"):
        out += [compiled(ids[:, t : t + 1], cache=cache) for t in range(17, 24)]
    assert relative_error(torch.cat(out, 1), expected) <= TOLERANCE


def test_no_room_is_refused_before_anything_is_written(model, config, device) -> None:
    ids = tokens(config, 1, 30, device)
    cache = model.new_cache(1, 32)
    model(ids, cache=cache)
    before = [s.clone() for s in cache.states]
    with pytest.raises(JetExportError, match="30 tokens held and 3 more exceed max_seq_len 32"):
        model(ids[:, :3], cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.states, strict=True))
    with pytest.raises(JetExportError, match="made for batch size 1, called with 2"):
        model(ids.expand(2, -1), cache=model.new_cache(1, 64))
    with pytest.raises(JetExportError, match="prefill_chunk is 8"):
        model(ids, cache=model.new_cache(1, 64, prefill_chunk=8))


def test_random_weights_use_the_published_initialisation(config) -> None:
    wide = JetNemotronConfig.from_dict({**config.to_dict(), "layer_types": ["jet"] * 200, "num_hidden_layers": 200})
    model = random_model(wide, torch.float32, seed=3)
    blocks: list[Any] = [layer.self_attn for layer in model.layers]
    A = torch.cat([block.A_log for block in blocks]).exp()
    dt = torch.nn.functional.softplus(torch.cat([block.dt_bias for block in blocks]))
    assert A.min() > 0
    assert A.max() <= 16
    assert abs(A.mean() - 8) < 1
    assert dt.min() >= 0.0009
    assert dt.max() <= 0.101
    assert abs(dt.log().mean() - math.log(0.01)) < 0.2
    assert torch.equal(random_model(wide, torch.float32, seed=3).norm.weight, model.norm.weight)
    again = random_model(wide, torch.float32, seed=4)
    assert not torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)
