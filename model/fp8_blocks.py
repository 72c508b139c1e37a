"""FP8 block-wise checkpoints, as Qwen and DeepSeek publish them: read by widening, a matrix at a time.

    X.weight             [N, K] E4M3 codes
    X.weight_scale_inv   [ceil(N / b), ceil(K / c)]: weight = code * scale of its block of b x c
    config.json          quantization_config: quant_method fp8, weight_block_size [b, c]

The engine's weights are then of the model dtype: its FP8 products have one scale a matrix, not one a block, and
activations of a calibrated scale. Source: transformers 5, integrations/finegrained_fp8.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError, shown

SUFFIX = "_scale_inv"


def block_size(config: JetNemotronConfig, where: str) -> tuple[int, int] | None:
    """(rows, columns) of a block; None if the checkpoint is not of this kind. Raises JetExportError for its relatives:
    one scale a matrix, other formats."""
    quant = config.raw.get("quantization_config")
    if not isinstance(quant, dict) or quant.get("quant_method") != "fp8":
        return None
    size, fmt = quant.get("weight_block_size"), quant.get("fmt", "e4m3")
    sizes = size if isinstance(size, list | tuple) else ()
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes) or fmt != "e4m3":
        raise JetExportError(
            f"{where}: quantization_config has quant_method fp8 with weight_block_size {shown(size)} and fmt "
            f"{shown(fmt)}.",
            "Read here: e4m3 with a scale for every block, as [128, 128].",
        )
    return sizes[0], sizes[1]


def widen_blocks(codes: Tensor, scales: Tensor, block: tuple[int, int], name: str, where: str) -> Tensor:
    """[N, K] fp32: codes * scales, each scale repeated over its block. Raises JetExportError for scales that do not
    fit the codes."""
    wanted = [-(-n // size) for n, size in zip(codes.shape, block, strict=False)]
    if codes.dim() != 2 or list(scales.shape) != wanted:
        raise JetExportError(
            f"{where}: {name}{SUFFIX} has shape {list(scales.shape)}, blocks of {list(block)} in {list(codes.shape)} "
            f"ask for {wanted}."
        )
    N, K = codes.shape
    every = scales.float().repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]
    return codes.float() * every


def is_blockwise(tensor: Tensor, name: str, scales: dict[str, Tensor]) -> bool:
    return tensor.dtype == torch.float8_e4m3fn and f"{name}{SUFFIX}" in scales
