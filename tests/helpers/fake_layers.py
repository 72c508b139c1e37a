"""Stand-ins for TensorRT-LLM's layers on a CPU: the interfaces of interfaces.toml, and their refusals.

Signatures are the real ones (test_interfaces.py compares them with the list), so an unknown argument is a TypeError.
Weights of another shape or dtype than the layer's, a missing scale and an input of another width are refused.
"""

import enum
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

FP8 = torch.float8_e4m3fn


class TensorParallelMode(enum.StrEnum):
    COLUMN = "column"
    ROW = "row"


class PositionEmbeddingType(enum.IntEnum):
    learned_absolute = 0
    rope_gptj = 1
    rope_gpt_neox = 2


@dataclass
class Mapping:
    tp_size: int = 1
    pp_size: int = 1
    enable_attention_dp: bool = False


@dataclass
class QuantConfig:
    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    exclude_modules: list[str] | None = None
    mamba_ssm_cache_dtype: torch.dtype | None = None

    def is_module_excluded_from_quantization(self, name):
        from fnmatch import fnmatchcase

        return any(fnmatchcase(name, pattern) for pattern in self.exclude_modules or [])


def copy_weight(dst, src):
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ValueError(f"weight {tuple(src.shape)} {src.dtype} for a parameter {tuple(dst.shape)} {dst.dtype}")
    dst.data.copy_(src)


class Linear(nn.Module):
    parts = 1

    def __init__(
        self, in_features, out_features, bias=True, dtype=None, mapping=None, tensor_parallel_mode=None,
        gather_output=False, quant_config=None, weights_loading_config=None, reduce_output=True,
        skip_create_weights_in_init=False, use_custom_cublas_mm=False, lora=None, allreduce_strategy=None,
        force_dynamic_quantization=False, use_cute_dsl_blockscaling_mm=False,
        use_cute_dsl_nvfp4_blockscaling_mm=False, use_cublaslt_nvfp4_blockscaling_mm=False, disable_deep_gemm=False,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.has_bias, self.dtype = in_features, out_features, bias, dtype
        self.mapping, self.tp_mode, self.quant_config = mapping or Mapping(), tensor_parallel_mode, quant_config
        self.tp_size = self.mapping.tp_size
        self._weights_created = False
        if not skip_create_weights_in_init:
            self.create_weights()

    @property
    def fp8(self):
        return self.quant_config is not None and self.quant_config.quant_algo == "FP8"

    def create_weights(self):
        if self._weights_created:
            return
        self._weights_created = True
        dtype = FP8 if self.fp8 else self.dtype
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None)
        if self.has_bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=self.dtype), requires_grad=False)
        if self.fp8:
            self.weight_scale = nn.Parameter(torch.tensor(float("nan")), requires_grad=False)
            self.input_scale = nn.Parameter(torch.tensor(float("nan")), requires_grad=False)

    def load_weights(self, weights):
        assert self._weights_created
        assert len(weights) == self.parts, f"{len(weights)} tensors for a layer of {self.parts}"
        rows = [w["weight"][:] for w in weights]
        if self.fp8:
            assert all(r.dtype == FP8 for r in rows)
            scales = [w["weight_scale"][...].reshape([]) for w in weights]
            copy_weight(self.weight_scale, max(scales))
            copy_weight(self.input_scale, max(w["input_scale"][...].reshape([]) for w in weights))
            rows = [(r.float() * s / self.weight_scale).to(FP8) for r, s in zip(rows, scales, strict=True)]
            copy_weight(self.weight, torch.cat([r.view(torch.uint8) for r in rows]).view(FP8))
        else:
            copy_weight(self.weight, torch.cat(rows))
        if self.bias is not None:
            copy_weight(self.bias, torch.cat([w["bias"][:] for w in weights]))

    def forward(self, input, *, all_reduce_params=None, lora_params=None, layer_idx=None):
        if input.shape[-1] != self.in_features or input.dtype != self.dtype:
            raise ValueError(f"input {tuple(input.shape)} {input.dtype} for {self.in_features} x {self.dtype}")
        if not self.fp8:
            return F.linear(input, self.weight, self.bias)
        q = (input.float() / self.input_scale).clamp(-448, 448).to(FP8).float()
        y = q @ self.weight.float().t() * (self.input_scale * self.weight_scale)
        return (y if self.bias is None else y + self.bias.float()).to(input.dtype)


class FusedQkv(Linear):
    parts = 3


class FusedGateUp(Linear):
    parts = 2


class Embedding(nn.Module):
    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        dtype=None,
        mapping=None,
        tensor_parallel_mode=None,
        gather_output=False,
        enable_torch_compile_for_embedding=False,
        use_custom_cublas_mm=False,
    ):
        super().__init__()
        self.tp_mode, self.tp_size = tensor_parallel_mode, (mapping or Mapping()).tp_size
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, dtype=dtype), requires_grad=False)

    def load_weights(self, weights):
        copy_weight(self.weight, weights[0]["weight"][:])

    def forward(self, input):
        assert input.dim() == 1
        return F.embedding(input.long(), self.weight)


class LMHead(Embedding):
    def forward(self, input):
        return F.linear(input, self.weight)


class RMSNorm(nn.Module):
    """As flashinfer's kernel: fp32, one cast."""

    def __init__(self, *, hidden_size, eps, dtype=None, device=None, has_weights=True, use_gemma=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device), requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * y).to(hidden_states.dtype)


class GatedMLP(nn.Module):
    def __init__(
        self, *, hidden_size, intermediate_size, bias, activation=F.silu, dtype=None, config=None,
        overridden_tp_size=None, reduce_output=True, layer_idx=None, use_cute_dsl_blockscaling_mm=False,
        disable_deep_gemm=False,
    ):  # fmt: skip
        super().__init__()
        assert activation is F.silu
        args = {"bias": bias, "dtype": dtype, "quant_config": config.get_quant_config()}
        args["skip_create_weights_in_init"] = config.skip_create_weights_in_init
        self.gate_up_proj = FusedGateUp(hidden_size, 2 * intermediate_size, **args)
        self.down_proj = Linear(intermediate_size, hidden_size, **args)

    def forward(self, x, all_rank_num_tokens=None, final_all_reduce_params=None, lora_params=None, **kwargs):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


@dataclass(kw_only=True)
class RopeParams:
    dim: int = 0
    theta: float = 10000.0

    @staticmethod
    def from_config(config):
        assert getattr(config, "rope_scaling", None) is None
        return RopeParams(dim=config.head_dim, theta=config.rope_theta)


@dataclass(kw_only=True)
class PositionalEmbeddingParams:
    type: PositionEmbeddingType
    embedder: object = None
    rope: RopeParams | None = None
    is_neox: bool = True


@dataclass
class KVCacheParams:
    use_cache: bool
    num_cached_tokens_per_seq: list[int] = field(default_factory=list)


class Attention(nn.Module):
    """Dense attention over keys that the fake manager holds by request; the window masks."""

    def __init__(
        self, *, hidden_size, num_attention_heads, num_key_value_heads, max_position_embeddings, bias,
        pos_embd_params=None, rope_fusion=None, layer_idx=None, dtype=None, dense_bias=None, config=None,
        q_scaling=1.0, attention_chunk_size=None,
    ):  # fmt: skip
        super().__init__()
        head_dim = config.pretrained_config.head_dim
        self.layer_idx, self.heads = layer_idx, (num_attention_heads, num_key_value_heads, head_dim)
        self.rope = pos_embd_params.rope
        args = {"dtype": dtype, "quant_config": config.get_quant_config()}
        args["skip_create_weights_in_init"] = config.skip_create_weights_in_init
        width = (num_attention_heads + 2 * num_key_value_heads) * head_dim
        self.qkv_proj = FusedQkv(hidden_size, width, bias=bias, **args)
        o_bias = bias if dense_bias is None else dense_bias
        self.o_proj = Linear(num_attention_heads * head_dim, hidden_size, bias=o_bias, **args)

    def forward(
        self,
        position_ids,
        hidden_states,
        attn_metadata,
        attention_mask=None,
        mrope_config=None,
        all_reduce_params=None,
        lora_params=None,
        attention_window_size=None,
        attention_mask_data=None,
        **kwargs,
    ):
        assert not kwargs, f"unknown arguments {sorted(kwargs)}"
        Hq, Hkv, Dh = self.heads
        T = hidden_states.shape[0]
        q, k, v = self.qkv_proj(hidden_states).view(T, -1, Dh).split([Hq, Hkv, Hkv], 1)
        q, k = self._rope(q, position_ids.view(-1)), self._rope(k, position_ids.view(-1))
        out, start = [], 0
        for request, n in zip(attn_metadata.request_ids, attn_metadata.seq_lens.tolist(), strict=True):
            rows = slice(start, start + n)
            keys, values = attn_metadata.kv_cache_manager.append(self.layer_idx, request, k[rows], v[rows])
            out.append(self._attend(q[rows], keys, values, attention_window_size))
            start += n
        assert start == T
        return self.o_proj(torch.cat(out).reshape(T, -1).to(hidden_states.dtype))

    def _rope(self, x, positions):
        i = torch.arange(0, self.rope.dim, 2, dtype=torch.float32)
        angle = positions[:, None].float() / self.rope.theta ** (i / self.rope.dim)
        cos, sin = (f.to(x.dtype)[:, None] for f in (angle.cos(), angle.sin()))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _attend(self, q, k, v, window):
        (Tq, Hq, Dh), L = q.shape, k.shape[0]
        k, v = (x.float().repeat_interleave(Hq // x.shape[1], 1) for x in (k, v))
        i, j = torch.arange(L - Tq, L)[:, None], torch.arange(L)[None]
        visible = (j <= i) & (j > i - (window or L))
        score = torch.einsum("ihd,jhd->hij", q.float(), k) * Dh**-0.5
        p = score.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", p, v)
