"""A stand-in for TensorRT-LLM's executor: its cache manager by the config's hybrid fields, its batch, its steps."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.fake_layers import KVCacheParams


class MambaHybridCacheManager:
    """States in pools of `slots` rows, full of NaN until written, and keys by layer and request.

    Sizes come from the pretrained config's fields alone, as in TensorRT-LLM's executor. `strided`: pools that are
    views of wider rows, as where states share blocks with the KV cache.
    """

    line = "1.2"

    def __init__(self, model_config, slots, strided=False):
        c, ssm_dtype = model_config.pretrained_config, model_config.quant_config.mamba_ssm_cache_dtype
        pattern = c.hybrid_override_pattern
        assert len(pattern) == c.num_hidden_layers and set(pattern) <= {"M", "*"}
        conv_dim = c.mamba_head_dim * c.mamba_num_heads + 2 * c.n_groups * c.ssm_state_size
        self.conv: dict[int, Tensor] = {}
        self.ssm: dict[int, Tensor] = {}
        self.keys: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        for i, kind in enumerate(pattern):
            if kind == "M":
                self.conv[i] = self._pool(slots, (conv_dim, c.conv_kernel - 1), c.torch_dtype, strided)
                size = (c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
                self.ssm[i] = self._pool(slots, size, ssm_dtype, strided)
            else:
                self.keys[i] = {}
        self.free, self.slot_of = list(range(slots)), {}
        self.state_indices = torch.zeros(slots, dtype=torch.int32)

    @staticmethod
    def _pool(slots, shape, dtype, strided):
        pool = torch.full((slots, 1 + strided, *shape), torch.nan, dtype=dtype)
        return pool[:, 0]

    def prepare_resources(self, request_ids):
        for request in request_ids:
            if request not in self.slot_of:
                self.slot_of[request] = self.free.pop()
        indices = [self.slot_of[r] for r in request_ids]
        self.state_indices[: len(indices)] = torch.tensor(indices, dtype=torch.int32)

    def free_resources(self, request):
        self.free.append(self.slot_of.pop(request))
        for held in self.keys.values():
            held.pop(request, None)

    def get_conv_states(self, layer_idx):
        return self.conv[layer_idx]

    def get_ssm_states(self, layer_idx):
        return self.ssm[layer_idx]

    def get_state_indices(self):
        return self.state_indices

    def append(self, layer_idx, request, k, v):
        held = self.keys[layer_idx].get(request)
        if held is not None:
            k, v = torch.cat([held[0], k]), torch.cat([held[1], v])
        self.keys[layer_idx][request] = (k, v)
        return k, v


class ManagerOf13(MambaHybridCacheManager):
    line = "1.3"

    def get_state_indices(self, request_ids, is_padding):  # type: ignore[override]
        return [self.slot_of[r] for r in request_ids]


@dataclass(kw_only=True)
class AttentionMetadata:
    kv_cache_manager: Any
    request_ids: list[int]
    seq_lens: torch.Tensor
    num_contexts: int
    kv_cache_params: KVCacheParams

    @property
    def num_seqs(self):
        return len(self.seq_lens)

    @property
    def seq_lens_cuda(self):
        return self.seq_lens

    def prepare(self):
        if self.kv_cache_manager.line == "1.3":
            indices = self.kv_cache_manager.get_state_indices(self.request_ids, [False] * self.num_seqs)
            self.mamba_metadata = MambaMetadata(torch.tensor([*indices, 0], dtype=torch.int32))


@dataclass
class MambaMetadata:
    state_indices: torch.Tensor


class Executor:
    """Steps over requests: prompts in chunks, then one token at a time, contexts first in every batch."""

    def __init__(self, model, manager):
        self.model, self.manager, self.held = model, manager, {}

    def step(self, contexts, generations):
        """{request: token ids} of the prompts' chunks and of decode; every token's logits, by request."""
        batch = {**contexts, **generations}
        assert all(len(t) == 1 for t in generations.values())
        self.manager.prepare_resources(list(batch))
        cached = [self.held.get(r, 0) for r in batch]
        metadata = AttentionMetadata(
            kv_cache_manager=self.manager,
            request_ids=list(batch),
            seq_lens=torch.tensor([len(t) for t in batch.values()], dtype=torch.int32),
            num_contexts=len(contexts),
            kv_cache_params=KVCacheParams(use_cache=True, num_cached_tokens_per_seq=cached),
        )
        metadata.prepare()
        positions = [torch.arange(c, c + len(t)) for c, t in zip(cached, batch.values(), strict=True)]
        ids = torch.cat([torch.as_tensor(t) for t in batch.values()]).int()
        with torch.no_grad():
            logits = self.model(
                attn_metadata=metadata,
                input_ids=ids,
                position_ids=torch.cat(positions)[None].int(),
                return_context_logits=True,
            )
        for r, t in batch.items():
            self.held[r] = self.held.get(r, 0) + len(t)
        return dict(zip(batch, logits.split([len(t) for t in batch.values()]), strict=True))

    def free(self, request):
        self.manager.free_resources(request)
        del self.held[request]
