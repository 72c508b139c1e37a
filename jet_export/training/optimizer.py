"""AdamW over fp32 parameters, learning-rate schedules and the clipping of gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jet_export.training.distributed import Group, is_sharded, local
from jet_export.training.model import TrainingModel, part_of
from jet_export.training.recipe import OptimizerRecipe, StageRecipe

STATE = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: TrainingModel, stage: StageRecipe, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """A group for each part, kind of tensor and weight decay, with the part's `lr_scale`; moments are zero."""
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = part_of(name, model.config.layer_types), is_sharded(p), p.ndim > 1
            groups.setdefault(key, []).append(p)
    first, second = recipe.betas
    optimizer = torch.optim.AdamW(
        [
            {
                "params": params,
                "lr_scale": stage.lr_scale.get(part, 1.0),
                "weight_decay": recipe.weight_decay if matrices else 0.0,
            }
            for (part, _, matrices), params in groups.items()
        ],
        lr=stage.lr,
        betas=(first, second),
        eps=recipe.eps,
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros(()), **{k: torch.zeros_like(p) for k in STATE}}
    return optimizer


def optimizer_tensors(model: TrainingModel, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Its state, by the parameter's name and the moment's: to save, and to load into."""
    return {
        f"{name}.{kind}": t
        for name, p in model.named_parameters()
        if p.requires_grad
        for kind, t in optimizer.state[p].items()
    }


def lr_at(stage: StageRecipe, step: int, steps: int) -> float:
    """The learning rate of step 0, 1, ..., steps - 1: linear warm-up; cosine to min_lr * lr, or constant, or wsd:
    constant and then linear to min_lr * lr over the last `decay` of the steps."""
    warmup = round(stage.warmup * steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    if stage.schedule == "constant":
        return stage.lr
    if stage.schedule == "wsd":
        decay = max(1, round(stage.decay * steps))
        done = max(0.0, (step + 1 - (steps - decay)) / decay)
    else:
        cosine = (step - warmup) / max(1, steps - 1 - warmup)
        done = (1 - math.cos(math.pi * min(1.0, cosine))) / 2
    return stage.lr * (1 - (1 - stage.min_lr) * done)


def set_lr(optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.AdamW, limit: float, group: Group) -> Tensor:
    """Scale all gradients so that their norm is at most `limit` (0: leave them). Returns the norm before, for which one
    process alone does not wait."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}  # sharded, or whole in every process
    for grad in (p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None):
        parts[is_sharded(grad)].append(local(grad))
    sharded, norm = (torch.nn.utils.get_total_norm(grads) for grads in parts.values())
    if group.world > 1:
        total = math.sqrt(group.sum([float(sharded) ** 2])[0] + float(norm) ** 2)
        norm = torch.tensor(total, device=group.device)
    if limit and (every := parts[True] + parts[False]):
        torch._foreach_mul_(every, (limit / norm).clamp(max=1.0))
    return norm
