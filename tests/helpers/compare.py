"""How the tests compare two tensors."""

import torch
from torch import Tensor


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in fp64; NaN never passes a comparison, and where b is all zeros only a = b does."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))
