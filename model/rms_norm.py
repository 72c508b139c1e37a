"""The norm of the residual and of heads."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """(w * x / sqrt(mean(x^2) + eps)) in fp32, one cast at the end (Qwen2 casts before the weight; this does not)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (self.weight.float() * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps))).to(x.dtype)
