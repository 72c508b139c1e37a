"""Learning rates, groups and clipping."""

from itertools import pairwise

import pytest
import torch
from helpers.retrofits import ALONE, models

from jet_export.training.optimizer import clip_gradients, lr_at, make_optimizer, set_lr
from jet_export.training.recipe import OptimizerRecipe, Recipe, StageRecipe
from jet_export.training.student import set_trainable


def test_cosine_warms_up_and_ends_at_its_minimum() -> None:
    stage = StageRecipe(lr=1.0, warmup=0.1, min_lr=0.1)
    rates = [lr_at(stage, i, 100) for i in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[10 + 89 // 2] == pytest.approx(0.55, abs=0.02)


def test_wsd_is_constant_and_then_falls() -> None:
    stage = StageRecipe(lr=1.0, warmup=0.0, decay=0.2, min_lr=0.0, schedule="wsd")
    rates = [lr_at(stage, i, 50) for i in range(50)]
    assert rates[:40] == [1.0] * 40 and rates[40:] == pytest.approx([0.9 - i / 10 for i in range(10)])


def test_one_step_has_a_learning_rate() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        assert 0 < lr_at(StageRecipe(lr=1.0, schedule=schedule), 0, 1) <= 1


def test_parts_have_their_own_learning_rates_and_matrices_decay(recipe: Recipe) -> None:
    student, _ = models(recipe)
    set_trainable(student, ("jet", "mlp"))
    stage = StageRecipe(lr=1.0, lr_scale={"mlp": 0.1})
    optimizer = make_optimizer(student, stage, OptimizerRecipe(weight_decay=0.3))
    set_lr(optimizer, 0.5)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, p in student.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert found["layers.0.mlp.down_proj.weight"] == (0.05, 0.3)
    assert found["layers.0.self_attn.o_proj.weight"] == (0.5, 0.3)
    assert found["layers.0.self_attn.A_log"] == (0.5, 0.0)


def norm_of(params: list[torch.nn.Parameter]) -> float:
    return torch.cat([p.grad.flatten() for p in params if p.grad is not None]).norm().item()


def test_gradients_are_clipped_together(recipe: Recipe) -> None:
    student, _ = models(recipe)
    set_trainable(student, ("jet",))
    optimizer = make_optimizer(student, StageRecipe(), OptimizerRecipe())
    params = [p for p in student.parameters() if p.requires_grad]
    rng = torch.Generator().manual_seed(0)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng)
    norm = norm_of(params)
    assert clip_gradients(optimizer, 0.0, ALONE).item() == pytest.approx(norm)
    assert clip_gradients(optimizer, 0.5, ALONE).item() == pytest.approx(norm)
    assert norm_of(params) == pytest.approx(0.5, rel=1e-4)
    assert clip_gradients(optimizer, 0.5, ALONE).item() == pytest.approx(0.5, rel=1e-4)
