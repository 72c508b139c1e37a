"""Muon for the matrices inside the layers, AdamW for the rest.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon): W -= lr * sqrt(max(1, rows / cols)) * orthogonalise(momentum),
orthogonalise being five Newton-Schulz steps in bf16. Matrices of one shape are orthogonalised in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MUON_LR, MUON_MOMENTUM, MUON_DECAY = 0.015, 0.95, 0.1
ADAM_LR, ADAM_BETAS, ADAM_DECAY = 3e-3, (0.9, 0.95), 0.01


def newton_schulz(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of x [n, rows, cols]."""
    transpose = x.shape[1] > x.shape[2]
    x = x.mT if transpose else x
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if transpose else x).float()


class Muon(torch.optim.Optimizer):
    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in params:
            groups[p.shape].append(p)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": ps} for ps in groups.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params, beta = group["params"], group["momentum"]
            rows, cols = params[0].shape
            grads = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            buffer = state.setdefault("momentum", torch.zeros_like(grads))
            buffer.lerp_(grads, 1 - beta)
            update = newton_schulz(grads.lerp(buffer, beta))
            step_size = group["lr"] * max(1.0, rows / cols) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-step_size)


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        inside = p.ndim == 2 and "embed_tokens" not in name and min(p.shape) >= 16
        (matrices if inside else rest).append(p)
    fused = next(model.parameters()).is_cuda
    return [
        Muon(matrices, MUON_LR, MUON_MOMENTUM, MUON_DECAY),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=ADAM_BETAS, weight_decay=ADAM_DECAY, fused=fused),
    ]


def set_lr_scale(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * scale


def lr_scale(progress: float) -> float:
    """Warm-up over 2 % of the run, constant to 40 %, then linear to zero."""
    if progress < 0.02:
        return max(progress, 1e-3) / 0.02
    return min(1.0, max(0.0, 1 - progress) / 0.6)
