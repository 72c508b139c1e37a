"""JetNemotronForCausalLM for TensorRT-LLM's PyTorch backend. Importing this registers it.

JetBlock is jet::jet_block over the cache manager's states; attention and FP8 linear layers are TensorRT-LLM's own.

Sliding-window layers pass their window to the attention kernel, which masks; their KV blocks are as many as those of
full attention. One GPU, no LoRA, no speculative decoding: adapt.check_model_config refuses the rest.
"""

from __future__ import annotations

from typing import Any

import tensorrt_llm
import torch
import torch.nn.functional as F
from tensorrt_llm._torch.models.modeling_utils import DecoderModel, DecoderModelForCausalLM, register_auto_model
from tensorrt_llm._torch.modules.embedding import Embedding
from tensorrt_llm._torch.modules.gated_mlp import GatedMLP
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode
from tensorrt_llm._torch.modules.rms_norm import RMSNorm
from tensorrt_llm.functional import PositionEmbeddingType
from torch import Tensor, nn

from jet_export.kernels import jet_block as _jet_block  # noqa: F401  registers jet::jet_block
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.model.config import JetNemotronConfig
from jet_export.trtllm.adapt import architecture, check_model_config, version_line
from jet_export.trtllm.config import correct_exclusions
from jet_export.trtllm.mapper import JetNemotronWeightMapper
from jet_export.trtllm.protocols import AttentionMetadataLike, ModelConfigLike
from jet_export.trtllm.states import Step, pools_of, step_of, write_back
from jet_export.utils.errors import JetExportError

try:
    from tensorrt_llm._torch.attention_backend.interface import PositionalEmbeddingParams, RopeParams
    from tensorrt_llm._torch.modules.attention import Attention
except ImportError:  # where later 1.3 release candidates moved them
    from tensorrt_llm._torch.attention.attention import Attention
    from tensorrt_llm._torch.attention.backends.interface import PositionalEmbeddingParams, RopeParams

LINE = version_line(tensorrt_llm.__version__)


class JetBlock(nn.Module):
    """Gated delta rule with a dynamic convolution; parameters as in jet_export.model.jet_nemotron.JetBlock."""

    def __init__(self, model_config: ModelConfigLike, c: JetNemotronConfig, layer_idx: int) -> None:
        super().__init__()
        H, K, V, D, R = c.jet_num_heads, c.head_k_dim, c.head_v_dim, c.jet_value_dim, c.generator_dim
        self.layer_idx, self.norm_eps = layer_idx, c.jet_norm_eps
        self.sizes, self.generator_dim = (H, K, V, c.conv_size), R
        dtype, quant = model_config.pretrained_config.torch_dtype, model_config.get_quant_config()
        skip = model_config.skip_create_weights_in_init
        self.in_proj = Linear(
            c.hidden_size,
            2 * H * K + 2 * D + R,
            bias=False,
            dtype=dtype,
            quant_config=quant,
            reduce_output=False,
            skip_create_weights_in_init=skip,
        )
        self.ba_proj = Linear(  # small, and never FP8
            c.hidden_size, 2 * H, bias=False, dtype=dtype, reduce_output=False, skip_create_weights_in_init=skip
        )
        self.w2 = Linear(
            R,
            D * c.conv_size,
            bias=True,
            dtype=dtype,
            quant_config=quant,
            reduce_output=False,
            skip_create_weights_in_init=skip,
        )
        self.A_log = nn.Parameter(torch.empty(H, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(H, dtype=torch.float32), requires_grad=False)
        self.o_norm = nn.Parameter(torch.empty(V, dtype=dtype), requires_grad=False)
        self.o_proj = Linear(
            D,
            c.hidden_size,
            bias=False,
            dtype=dtype,
            quant_config=quant,
            reduce_output=False,
            skip_create_weights_in_init=skip,
        )

    def forward(self, x: Tensor, metadata: AttentionMetadataLike, step: Step) -> Tensor:  # [T, hidden]
        manager = metadata.kv_cache_manager
        assert manager is not None  # checked by step_of
        conv, ssm = manager.get_conv_states(self.layer_idx), manager.get_ssm_states(self.layer_idx)
        pools = pools_of(conv, ssm, step.slots, self.sizes)
        H, K, V, _ = self.sizes
        qkuz = self.in_proj(x)
        kappa = self.w2(F.silu(qkuz[:, -self.generator_dim :]))
        o = torch.ops.jet.jet_block(
            qkuz,
            self.ba_proj(x),
            kappa,
            self.A_log,
            self.dt_bias,
            self.o_norm,
            pools.conv_state,
            pools.recurrent_state,
            step.cu_seqlens,
            pools.slots,
            step.context_lens,
            H,
            K,
            V,
            self.norm_eps,
            int(Form.DECODE if step.decode else Form.MIXED),
            *NO_BUFFER,
            None,
        )
        write_back(pools, conv, ssm, step.slots)
        out: Tensor = self.o_proj(o)
        return out


class JetAttention(Attention):
    """Full attention (window 0) or sliding window; RoPE and the KV cache are TensorRT-LLM's."""

    def __init__(self, model_config: ModelConfigLike, c: JetNemotronConfig, layer_idx: int, window: int) -> None:
        hf = model_config.pretrained_config
        rope = PositionalEmbeddingParams(type=PositionEmbeddingType.rope_gpt_neox, rope=RopeParams.from_config(hf))
        super().__init__(
            hidden_size=c.hidden_size,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            max_position_embeddings=c.max_position_embeddings,
            bias=True,
            pos_embd_params=rope,
            layer_idx=layer_idx,
            dtype=hf.torch_dtype,
            dense_bias=False,
            config=model_config,
        )
        self.window = window or None

    def forward(self, position_ids: Tensor | None, hidden_states: Tensor, attn_metadata: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(
            position_ids=position_ids,
            hidden_states=hidden_states,
            attn_metadata=attn_metadata,
            attention_window_size=self.window,
            **kwargs,
        )
        return out


class JetNemotronLayer(nn.Module):
    def __init__(self, model_config: ModelConfigLike, c: JetNemotronConfig, layer_idx: int) -> None:
        super().__init__()
        kind, dtype = c.layer_types[layer_idx], model_config.pretrained_config.torch_dtype
        self.input_layernorm = RMSNorm(hidden_size=c.hidden_size, eps=c.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden_size=c.hidden_size, eps=c.rms_norm_eps, dtype=dtype)
        window = c.window_size if kind == "swa" else 0
        self.self_attn: nn.Module = (
            JetBlock(model_config, c, layer_idx) if kind == "jet" else JetAttention(model_config, c, layer_idx, window)
        )
        self.mlp = GatedMLP(
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            bias=False,
            dtype=dtype,
            config=model_config,
            layer_idx=layer_idx,
        )

    def forward(self, position_ids: Tensor | None, h: Tensor, metadata: AttentionMetadataLike, step: Step) -> Tensor:
        x = self.input_layernorm(h)
        if isinstance(self.self_attn, JetBlock):
            h = h + self.self_attn(x, metadata, step)
        else:
            h = h + self.self_attn(position_ids=position_ids, hidden_states=x, attn_metadata=metadata)
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


class JetNemotronModel(DecoderModel):
    def __init__(self, model_config: ModelConfigLike) -> None:
        super().__init__(model_config)
        c, dtype = architecture(model_config.pretrained_config), model_config.pretrained_config.torch_dtype
        self.embed_tokens = Embedding(
            c.vocab_size,
            c.hidden_size,
            dtype=dtype,
            mapping=model_config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            gather_output=True,
        )
        self.layers = nn.ModuleList(JetNemotronLayer(model_config, c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(hidden_size=c.hidden_size, eps=c.rms_norm_eps, dtype=dtype)

    def forward(
        self,
        attn_metadata: AttentionMetadataLike,
        input_ids: Tensor | None = None,  # [T] packed, contexts first
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # [T, hidden]
        **kwargs: Any,
    ) -> Tensor:  # [T, hidden]
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if kwargs.get("spec_metadata") is not None:
            raise JetExportError("JetNemotronForCausalLM: speculative decoding is not supported.", "Leave it out.")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        step = step_of(attn_metadata, LINE)
        for layer in self.layers:
            h = layer(position_ids, h, attn_metadata, step)
        out: Tensor = self.norm(h)
        return out


@register_auto_model("JetNemotronForCausalLM")
class JetNemotronForCausalLM(DecoderModelForCausalLM):
    """The architecture of the checkpoint's config.json, as TensorRT-LLM's registry knows it."""

    def __init__(self, model_config: ModelConfigLike) -> None:
        check_model_config(model_config, tensorrt_llm.__version__)
        correct_exclusions(model_config)
        hf = model_config.pretrained_config
        super().__init__(
            JetNemotronModel(model_config), config=model_config, hidden_size=hf.hidden_size, vocab_size=hf.vocab_size
        )

    def load_weights(self, weights: dict[str, Any], weight_mapper: JetNemotronWeightMapper) -> None:
        super().load_weights(weight_mapper.preprocess_weights(weights), weight_mapper)
