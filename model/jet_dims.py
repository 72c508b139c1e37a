"""JetDims: the sizes of one JetBlock, and their form in config.json."""

from __future__ import annotations

import math
from typing import NamedTuple


class JetDims(NamedTuple):
    """Sizes of one JetBlock: H heads of K keys and V values."""

    num_heads: int
    head_k_dim: int
    head_v_dim: int

    @property
    def value_dim(self) -> int:
        """D = H * V, the width of its values."""
        return self.num_heads * self.head_v_dim

    def __str__(self) -> str:
        return f"{self.head_k_dim}x{self.head_v_dim}x{self.num_heads}"


def expand_v_of(dims: JetDims) -> float:
    """The published form of V: the ratio for which int(head_dim * expand_v) is V, with ten digits if those suffice."""
    ratio = round(dims.head_v_dim / dims.head_k_dim, 10)
    if int(dims.head_k_dim * ratio) < dims.head_v_dim:
        ratio = dims.head_v_dim / dims.head_k_dim
    while int(dims.head_k_dim * ratio) < dims.head_v_dim:
        ratio = math.nextafter(ratio, math.inf)
    return ratio
