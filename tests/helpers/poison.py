"""Outputs and workspaces that start as NaN, so that what a kernel leaves unwritten shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def poisoned(value: float = torch.nan) -> Iterator[None]:
    """Tensor.new_empty, by which launchers allocate, fills with `value`."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *shape, **kwargs) -> Tensor:
        x = new_empty(self, *shape, **kwargs)
        return x.fill_(value) if x.is_floating_point() and x.device.type != "meta" else x

    with patch.object(Tensor, "new_empty", filled):
        yield
