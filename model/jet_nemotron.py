"""Jet-Nemotron and its relatives: gated delta rules, attention and sliding-window layers over packed tokens, one
definition for every engine and every family (config.py says which sizes and options a family has).

    h += Mix(RMS(h));  h += down(silu(gate(x)) * up(x)), x = RMS(h);  logits = RMS(h) @ embed^T

A batch is packed: x is [T, hidden] for N sequences delimited by `cu_seqlens`; the mixers' cores are the ops of
`jet_export.kernels`, which carry the states in place (mixers.py). Projections that read the same x are one matrix:
[q|k|v|gate|w1] and [b|a] of a JetBlock, [q|k|v|gate] of attention, [gate|up] of the MLP.
Source: arXiv 2508.15884 and NVlabs/Jet-Nemotron (`modeling_jet_nemotron.py`, `jet_block.py`, `dynamic_conv.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jet_export.kernels import gemv as _gemv  # noqa: F401  registers jet::gemv
from jet_export.kernels import keep_hidden as _keep_hidden  # noqa: F401  registers jet::keep_hidden
from jet_export.kernels.form import Form
from jet_export.model.cache import Cache, PackedBatch, states_per_layer
from jet_export.model.config import JetNemotronConfig
from jet_export.model.linear import Hidden, Layers, norm_later, normed, project, project_gated
from jet_export.model.mixers import Attention as Attention
from jet_export.model.mixers import JetBlock as JetBlock
from jet_export.model.rms_norm import RMSNorm
from jet_export.model.weights import CheckpointFiles, WeightedModel, check_tensors, load_checkpoint, save_checkpoint


class MLP(nn.Module):
    def __init__(self, c: JetNemotronConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, h: Hidden, norm: RMSNorm, ahead: Layers = ()) -> Hidden:
        """h + MLP(norm(h))."""
        x, later = norm_later(h, norm, self.gate_up_proj)
        gated = project_gated(self.gate_up_proj, x, later, self.down_proj)
        return project(self.down_proj, gated, residual=h, ahead=ahead)


class DecoderLayer(nn.Module):
    def __init__(self, c: JetNemotronConfig, layer: int) -> None:
        super().__init__()
        self.kind = kind = c.layer_types[layer]
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        window = c.window_size if kind == "swa" else 0
        self.self_attn: nn.Module = JetBlock(c, c.jet_dims(layer)) if kind == "jet" else Attention(c, window)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(
        self,
        h: Hidden,
        cos_sin: Tensor,
        batch: PackedBatch,
        state: tuple[Tensor, ...],
        form: Form,
        ahead: Layers = (),
        interval: int = 1,
    ) -> Hidden:
        """ahead: the linear layer that follows this one's."""
        tail = (batch, state, form, (self.mlp.gate_up_proj,))
        mixer = (*tail, interval) if self.kind == "jet" else (cos_sin, *tail)
        h = self.self_attn(h, self.input_layernorm, *mixer)
        out: Hidden = self.mlp(h, self.post_attention_layernorm, ahead)
        return out

    @property
    def first(self) -> nn.Module:
        """The linear layer that reads the residual first."""
        first: nn.Module = getattr(self.self_attn, "in_proj" if self.kind == "jet" else "qkv_proj")
        return first


class PackedOutput(NamedTuple):
    logits: Tensor  # [M, vocab]
    hidden_states: list[Tensor]  # each layer's output [T, hidden]; empty unless asked for


class JetNemotronForCausalLM(WeightedModel):
    """The model: `from_pretrained` loads it, `forward` is the batch API, engines are built from `forward_packed`."""

    cos_sin: Tensor
    loaded_from: Path | None = None  # the checkpoint's directory

    def __init__(self, config: JetNemotronConfig, max_positions: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.max_positions = max_positions or config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp: nn.Module | None = None  # a MultiTokenPredictor (mtp.py): then hidden states are kept for it
        self.register_buffer("cos_sin", torch.empty(self.max_positions, config.rope_dim), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        max_positions: int | None = None,
        *,
        mtp: bool = False,
    ) -> JetNemotronForCausalLM:
        """Load a preset (`"jet-tiny"`), a Hugging Face directory or a hub id, tensor by tensor onto `device`.

        Needs no more host memory than the model itself (on a CPU) and one tensor. Raises JetExportError naming the
        file or tensor that is missing, truncated or of the wrong shape. `mtp`: its multi-token-prediction layer is read
        too, by MultiTokenPredictor.from_pretrained (mtp.py): no warning that it is left out.
        """
        from jet_export.model.hub import resolve_checkpoint

        directory = resolve_checkpoint(str(source))
        files = CheckpointFiles.open(directory)
        fp8 = check_tensors(files, mtp=mtp)
        model = empty_model(files.config, dtype, torch.device(device), max_positions)
        load_checkpoint(model, files, fp8)
        model.loaded_from = directory
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and safetensors under the published names, for `from_pretrained` and the published code;
        and, in `tokenizer/` too, the tokenizer of the directory that the model was loaded from."""
        save_checkpoint(self, Path(path), self.loaded_from)

    def new_cache(
        self,
        batch_size: int,
        max_seq_len: int,
        prefill_chunk: int | None = None,
        kv_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> Cache:
        """States of `batch_size` empty sequences of up to `max_seq_len` tokens.

        One call takes at most `prefill_chunk` tokens (default: any number) of a sequence, since sliding-window layers
        keep only their window and one chunk."""
        return Cache.allocate(
            self.config,
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk or max_seq_len,
            dtype=self.dtype,
            kv_dtype=kv_dtype or self.dtype,
            state_dtype=state_dtype,
            device=self.device,
        )

    def forward(
        self,
        input_ids: Tensor,  # [B, T] int
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,  # [B, T], 0 for left padding
    ) -> Tensor:
        """Logits [B, T, vocab] of prefill, chunked prefill or decode, continuing from `cache` and updating it.

        With `attention_mask`, padded positions (on the left) are left out: they change no state; their logits are 0.
        Raises JetExportError if the tokens do not fit the cache (not checked inside torch.compile).
        """
        B, T = input_ids.shape
        if cache is None:
            cache = self.new_cache(B, T)
        if not torch.compiler.is_compiling():
            cache.check_room(B, T)
        mask = None if attention_mask is None else attention_mask.bool()
        batch = cache.batch(T, mask)
        tokens = input_ids.reshape(-1) if mask is None else input_ids[mask]
        form = Form.DECODE if T == 1 and mask is None else Form.PREFILL
        logits = self.forward_packed(tokens, batch, cache.states, None, form).logits
        cache.advance(batch)
        if mask is None:
            return logits.reshape(B, T, -1)
        padded = logits.new_zeros(B, T, logits.shape[-1])
        padded[mask] = logits
        return padded

    def forward_packed(
        self,
        input_ids: Tensor,  # [T] int
        batch: PackedBatch,
        states: list[Tensor],  # flat, in the order of cache.state_specs; updated in place
        logit_indices: Tensor | None,  # [M] int32 rows of the packed tokens to return logits for; None: all
        form: Form,
        hidden_states: bool = False,
        interval: int = 1,
    ) -> PackedOutput:
        """One step over packed tokens, of the stated form. `interval`: that of the states, see cache.state_specs."""
        states, kept_hidden = (states[:-1], states[-1]) if self.mtp is not None else (states, None)
        h = self.embed_tokens(input_ids)
        kept = []
        ahead = [*(layer.first for layer in self.layers), self.lm_head][1:]
        for layer, state, later in zip(self.layers, states_per_layer(self.config, states), ahead, strict=True):
            h = layer(h, self.cos_sin, batch, state, form, (later,), interval)
            if hidden_states:
                kept.append(h)
        if kept_hidden is None:
            x = normed(h if logit_indices is None else h.index_select(0, logit_indices), self.norm)
        else:
            x = normed(h, self.norm)
            torch.ops.jet.keep_hidden(x, kept_hidden, batch.block_table, *batch[:3])
            x = x if logit_indices is None else x.index_select(0, logit_indices)
        return PackedOutput(project(self.lm_head, x), kept)


def rope_table(config: JetNemotronConfig, positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[positions, R]: cos | sin of position * theta^(-2i / R), in fp32, then cast to the model dtype. R: rope_dim."""
    i = torch.arange(0, config.rope_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / (config.rope_theta ** (i / config.rope_dim))
    angle = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * inv_freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


KEEP_FP32 = ("A_log", "dt_bias")


def keeps_fp32(name: str, config: JetNemotronConfig) -> bool:
    """Whether a parameter is fp32 in every model dtype: those of the decay, and norms' weights read as 1 + w."""
    return name.endswith(KEEP_FP32) or (config.norm_offset and name.endswith("norm.weight"))


def empty_model(
    config: JetNemotronConfig, dtype: torch.dtype, device: torch.device, max_positions: int | None = None
) -> JetNemotronForCausalLM:
    """A model with uninitialised parameters on `device`, and its RoPE table."""
    with torch.device("meta"):
        model = JetNemotronForCausalLM(config, max_positions)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if keeps_fp32(name, config) else dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.cos_sin = rope_table(config, model.max_positions, dtype, device)
    return model.eval()


@torch.no_grad()
def random_model(
    config: JetNemotronConfig,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
    max_positions: int | None = None,
) -> JetNemotronForCausalLM:
    """Random weights, by the published initialisation: N(0, 0.02) matrices, A = exp(A_log) ~ U(0, 16),
    softplus(dt_bias) log-uniform in [0.001, 0.1], static taps (w2.bias, conv1d) ~ U(-W^-0.5, W^-0.5), norms 1."""
    model = empty_model(config, dtype, torch.device(device), max_positions)
    randomize(model, config, seed)
    return model


@torch.no_grad()
def randomize(module: nn.Module, config: JetNemotronConfig, seed: int) -> None:
    """Random weights, as `random_model` has them."""
    rng = torch.Generator(device=next(module.parameters()).device).manual_seed(seed)
    std = float(config.raw.get("initializer_range", 0.02))
    for name, p in module.named_parameters():
        if name.endswith("A_log"):
            p.copy_(torch.empty_like(p).uniform_(1e-4, 16, generator=rng).log())
        elif name.endswith("dt_bias"):
            dt = torch.empty_like(p).uniform_(-6.907755, -2.302585, generator=rng).exp().clamp_(min=1e-4)
            p.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif name.endswith(("w2.bias", "conv1d")):
            p.uniform_(-(config.conv_size**-0.5), config.conv_size**-0.5, generator=rng)
        elif "norm" in name:
            p.fill_(1.0)
        elif name.endswith("bias"):
            p.zero_()
        else:
            p.normal_(0.0, std, generator=rng)
