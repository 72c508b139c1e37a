"""Blocks and designs: sequences apart, causal, trained everywhere; equal to the JetBlock where they say so."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.retrofits import rows_of

from jet_export.model.jet_dims import JetDims
from jet_export.model.jet_nemotron import JetBlock
from jet_export.postnas.blocks import MIXERS
from jet_export.postnas.design import DESIGNS, DesignedBlock
from jet_export.postnas.mixer import Mixer, MixerLayer, Sizes, init_mixer, replace_mixers
from jet_export.postnas.recipe import BLOCKS
from jet_export.training.data.rows import Batch
from jet_export.training.layer import jet_block

SIZES = Sizes(hidden=24, dims=JetDims(2, 16, 32), conv_size=4, reduction=8, norm_eps=1e-5)
MAKES: dict[str, Callable[[Sizes], Mixer]] = {
    **MIXERS,
    **{f"design: {n}": partial(DesignedBlock, design=d) for n, d in DESIGNS.items()},
}


def made(name: str, seed: int = 0) -> Any:
    mixer = MAKES[name](SIZES)
    init_mixer(mixer, seed)
    for p in mixer.parameters():  # away from values at which a part has no effect
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return mixer


@pytest.mark.parametrize("name", MAKES)
def test_packed_is_one_by_one_causal_and_trains_everywhere(name: str) -> None:
    mixer, lengths = made(name), [5, 1, 17]
    batch = Batch.of(rows_of([lengths], 10))
    x = torch.randn(23, 24, generator=torch.Generator().manual_seed(1))
    packed = mixer(x, batch)
    alone = [mixer(part, Batch.of(rows_of([[len(part)]], 10))) for part in x.split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-6)
    changed = x.clone()
    changed[15:] += 1
    later = mixer(changed, batch)
    torch.testing.assert_close(later[:15], packed[:15], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(later[15:], packed[15:])
    packed.square().sum().backward()
    idle = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("name", MAKES)
def test_in_autocast_as_models_train_on_a_gpu(name: str) -> None:
    """bf16 products around the rule, which has its own precision: within two bf16 roundings of fp32."""
    mixer = made(name)
    batch = Batch.of(rows_of([[5, 1, 17]], 10))
    x = torch.randn(23, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x, batch)
    exact = mixer(x.float(), batch)
    assert (y.float() - exact).norm() / exact.norm() < 2 * 2**-7
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_every_block_of_the_recipe_is_here() -> None:
    assert set(BLOCKS) == {"jet", *MIXERS}


def test_the_design_named_jet_is_the_jet_block(pair, batch) -> None:
    student, _ = pair
    block = student.layers[0].self_attn
    assert isinstance(block, JetBlock)
    c = student.config
    ours = DesignedBlock(Sizes(c.hidden_size, c.jet_dims(0), 4, 8, c.jet_norm_eps), DESIGNS["jet"])
    R = block.generator_dim
    with torch.no_grad():
        ours.in_proj.weight.copy_(block.in_proj.weight[:-R])
        ours.w1.weight.copy_(block.in_proj.weight[-R:])
        ours.w2.weight.copy_(block.w2.weight)
        ours.v.conv.copy_(block.w2.bias.view(-1, 4))
        for name in ("A_log", "dt_bias", "o_norm"):
            getattr(ours, name).copy_(getattr(block, name))
        ours.ba_proj.weight.copy_(block.ba_proj.weight)
        ours.o_proj.weight.copy_(block.o_proj.weight)
        x = torch.randn(64, c.hidden_size)
        torch.testing.assert_close(ours(x, batch), jet_block(block, x, student.context(batch)), rtol=1e-5, atol=1e-7)


def test_static_convolutions_on_q_k_v_make_gated_deltanet(batch) -> None:
    ours, gdn = made("design: static q, k, v"), made("gdn", seed=1)
    D, qk = 64, 64
    with torch.no_grad():
        ours.in_proj.weight.copy_(gdn.in_proj.weight)
        ours.ba_proj.weight.copy_(torch.cat([gdn.b_proj.weight, gdn.decay.a_proj.weight]))
        ours.qk.conv.copy_(gdn.conv[:qk])
        ours.v.conv.copy_(gdn.conv[qk : qk + D])
        ours.A_log.copy_(gdn.decay.A_log)
        ours.dt_bias.copy_(gdn.decay.dt_bias)
        ours.o_norm.copy_(gdn.o_norm)
        ours.o_proj.weight.copy_(gdn.o_proj.weight)
        x = torch.randn(64, 24)
        torch.testing.assert_close(ours(x, batch), gdn(x, batch), rtol=1e-4, atol=1e-6)


def test_mixers_are_drawn_from_seed_and_layer(recipe, teacher_directory) -> None:
    from helpers.retrofits import models

    made = replace(recipe, training=replace(recipe.training, teacher=str(teacher_directory)))
    drawn: list[Any] = [
        replace_mixers(models(made.student("jaj", made.training.stage[:1]))[0], MIXERS["gla"], seed)
        for seed in (0, 0, 1)
    ]
    kinds = [isinstance(layer, MixerLayer) for layer in drawn[0].layers]
    assert kinds == [True, False, True]
    first, again, other = (m.layers[0].self_attn.in_proj.weight for m in drawn)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, drawn[0].layers[2].self_attn.in_proj.weight)
