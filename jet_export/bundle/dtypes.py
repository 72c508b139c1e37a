"""Names of dtypes, as a manifest and the command line have them."""

from __future__ import annotations

import torch

from jet_export.utils.errors import JetExportError


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, {"fp8": "float8_e4m3fn"}.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise JetExportError(f"dtype {name!r} is not known.", "Known: bfloat16, float32, fp8 (KV cache).")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
