"""The members of TensorRT-LLM's objects that the model uses, for mypy; checked against interfaces.toml."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class MappingLike(Protocol):
    """tensorrt_llm.mapping.Mapping"""

    tp_size: int
    pp_size: int
    enable_attention_dp: bool


class QuantConfigLike(Protocol):
    """tensorrt_llm.models.modeling_utils.QuantConfig"""

    quant_algo: Any
    exclude_modules: list[str] | None
    mamba_ssm_cache_dtype: torch.dtype | None


class ModelConfigLike(Protocol):
    """tensorrt_llm._torch.model_config.ModelConfig"""

    pretrained_config: Any
    quant_config: QuantConfigLike
    mapping: MappingLike
    skip_create_weights_in_init: bool
    spec_config: Any
    lora_config: Any

    def get_quant_config(self) -> QuantConfigLike: ...


class CacheManagerLike(Protocol):
    """tensorrt_llm._torch.pyexecutor.mamba_cache_manager.MambaHybridCacheManager"""

    def get_conv_states(self, layer_idx: int) -> Tensor: ...  # [slots, conv_dim, d_conv - 1]

    def get_ssm_states(self, layer_idx: int) -> Tensor: ...  # [slots, num_heads, head_dim, d_state]

    def get_state_indices(self) -> Tensor: ...  # [max_batch_size] int32; this form in 1.2 only


class MambaMetadataLike(Protocol):
    """tensorrt_llm._torch.modules.mamba.mamba2_metadata.Mamba2Metadata"""

    state_indices: Tensor  # [max_batch_size] int32; 1.3


class KVCacheParamsLike(Protocol):
    """tensorrt_llm._torch.metadata.KVCacheParams"""

    num_cached_tokens_per_seq: list[int]  # on the host


class AttentionMetadataLike(Protocol):
    """tensorrt_llm._torch.attention_backend.interface.AttentionMetadata"""

    kv_cache_manager: CacheManagerLike | None
    kv_cache_params: KVCacheParamsLike
    mamba_metadata: MambaMetadataLike | None  # 1.3

    @property
    def num_contexts(self) -> int: ...

    @property
    def num_seqs(self) -> int: ...

    @property
    def seq_lens_cuda(self) -> Tensor: ...  # [num_seqs] int32
