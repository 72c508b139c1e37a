"""Mixers in place of JetBlocks, and what they share: packed rows in and out, drawn from a seed.

A mixer has its layer's parameters under `self_attn`, so that training, checkpoints and sharding treat it as the
JetBlock that it stands for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jet_export.model.jet_dims import JetDims
from jet_export.training.data.rows import Batch
from jet_export.training.layer import Context, LayerOutput, TrainingLayer
from jet_export.training.model import TrainingModel


@dataclass(frozen=True)
class Sizes:
    hidden: int
    dims: JetDims
    conv_size: int
    reduction: int  # D / generator width
    norm_eps: float


class Mixer(nn.Module, ABC):
    """[T, hidden], normalised -> [T, hidden], over the batch's sequences."""

    @abstractmethod
    def forward(self, x: Tensor, batch: Batch) -> Tensor: ...


class MixerLayer(TrainingLayer):
    """A layer with a Mixer; the rest is the layer's that it replaces."""

    def __init__(self, layer: TrainingLayer, mixer: Mixer) -> None:
        nn.Module.__init__(self)
        self.kind = layer.kind
        self.input_layernorm = layer.input_layernorm
        self.self_attn = mixer
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp
        self.activation_checkpointing = layer.activation_checkpointing

    def _run(self, h: Tensor, context: Context, mixer_only: bool) -> LayerOutput:
        mixed = self.self_attn(self.input_layernorm(h), context.batch)
        if mixer_only:
            return LayerOutput(h, mixed)
        return LayerOutput(self.mlp(h + mixed, self.post_attention_layernorm), mixed)


def replace_mixers(model: TrainingModel, make: Callable[[Sizes], Mixer], seed: int) -> TrainingModel:
    """The model with a mixer in place of each JetBlock: fp32 parameters, drawn from the seed and the layer."""
    c = model.config
    for i, layer in enumerate(model.training_layers):
        if layer.kind == "jet":
            sizes = Sizes(c.hidden_size, c.jet_dims(i), c.conv_size, c.dconv_generator_reduction, c.jet_norm_eps)
            with torch.device("cpu"):
                mixer = make(sizes)
            init_mixer(mixer, seed * 100_003 + i)
            model.layers[i] = MixerLayer(layer, mixer.to(model.embed_tokens.weight.device))
    return model


@torch.no_grad()
def init_mixer(mixer: Mixer, seed: int) -> None:
    """As the published JetBlock: N(0, 0.02) matrices, A = exp(A_log) ~ U(0, 16), softplus(dt_bias) log-uniform in
    [0.001, 0.1], convolutions ~ U(-W^-0.5, W^-0.5), norms 1; other vectors as their module has set them."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in mixer.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "A_log":
            p.copy_(torch.empty_like(p).uniform_(1e-4, 16, generator=rng).log())
        elif leaf == "dt_bias":
            dt = torch.empty_like(p).uniform_(math.log(0.001), math.log(0.1), generator=rng).exp()
            p.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif leaf == "conv":
            p.uniform_(-(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5, generator=rng)
        elif p.ndim > 1:
            p.normal_(0.0, 0.02, generator=rng)


def short_conv(x: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    """x [T, D], weight [D, W], the last tap of the current token; zeros before each sequence. No activation."""
    W = weight.shape[1]
    weight, position = weight.to(x.dtype), batch.positions
    y = x * weight[:, -1]
    for back in range(1, min(W, len(x))):
        y = y + F.pad(x[:-back], (0, 0, back, 0)) * (position >= back)[:, None] * weight[:, W - 1 - back]
    return y


def own_precision(x: Tensor) -> torch.autocast:
    """For rules, which choose their own precision, in a model that runs in autocast."""
    return torch.autocast(x.device.type, enabled=False)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """[T, H * d] -> [T, H, d]."""
    return torch.unflatten(x, 1, (num_heads, -1))


def unit(x: Tensor) -> Tensor:
    """fp32, L2-normalised over the last axis."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def rms(x: Tensor, eps: float) -> Tensor:
    """fp32, over the last axis."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def low_rank(hidden: int, rank: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, out, bias=False))
