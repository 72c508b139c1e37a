"""The gated delta rule alone by others' kernels, over the same inputs and states as jet::gated_delta_rule.

Each takes its own conventions, as its docstrings state them: FLA and FlashInfer's decode have q, k [B, T, HK, K],
FlashInfer's prefill is packed; g is natural-log decay for FLA and exp(g) for FlashInfer's prefill, while its decode
computes g and beta from a, b, A_log and dt_bias; a state is [H, K, V], or [H, V, K] in FlashInfer's prefill and one of
its two decodes. All scale q by K**-0.5. Who does not normalise q and k itself gets them normalised.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import NO_BUFFER

Run = Callable[[], tuple[Tensor, Tensor]]  # o [N*T, H, V] and the final states [N, H, K, V]


@dataclass(frozen=True)
class RuleCase:
    """N sequences of T tokens each, q and k normalised; a, b, A_log and dt_bias are what beta and g come from."""

    q: Tensor  # [N, T, HK, K]
    k: Tensor  # [N, T, HK, K]
    v: Tensor  # [N, T, H, V]
    beta: Tensor  # [N, T, H]
    g: Tensor  # [N, T, H]
    a: Tensor  # [N, T, H]
    b: Tensor  # [N, T, H]
    A_log: Tensor  # [H]
    dt_bias: Tensor  # [H]
    state: Tensor  # [N, H, K, V], of its own
    sequences: tuple[Tensor, Tensor, Tensor]  # cu_seqlens, slots, context_lens

    @classmethod
    def of(cls, args: tuple, key_heads: int) -> RuleCase:
        """The delta rule of jet_block's arguments, without the convolution before it."""
        qkuz, ba, _, A_log, dt_bias, _, _, state, *sequences, H, K, V, _ = args
        N, HK = state.shape[0], key_heads
        q, k, v = qkuz[:, : 2 * HK * K + H * V].unflatten(0, (N, -1)).split([HK * K, HK * K, H * V], -1)
        q, k = (F.normalize(x.unflatten(-1, (HK, K)).float(), dim=-1).to(x.dtype) for x in (q, k))
        b, a = (x.contiguous() for x in ba.unflatten(0, (N, -1)).split(H, -1))
        g = -A_log.exp() * F.softplus(a.float() + dt_bias)
        v = v.unflatten(-1, (H, V)).contiguous()
        return cls(q, k, v, b.sigmoid(), g, a, b, A_log, dt_bias, state.clone(), tuple(sequences))

    def again(self) -> RuleCase:
        """The same over a copy of the state."""
        return replace(self, state=self.state.clone())


def ours(case: RuleCase, form: Form) -> Run:
    packed = [x.flatten(0, 1) for x in (case.q, case.k, case.v, case.beta, case.g)]

    def run() -> tuple[Tensor, Tensor]:
        o = torch.ops.jet.gated_delta_rule(*packed, case.state, *case.sequences, form, *NO_BUFFER)
        return o, case.state

    return run


def fla_chunk(fla: Any, case: RuleCase) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        o, state = fla.chunk_gated_delta_rule(
            case.q, case.k, case.v, case.g, case.beta, initial_state=case.state, output_final_state=True
        )
        return o.flatten(0, 1), state

    return run


def fla_recurrent(fla: Any, case: RuleCase) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        o, state = fla.fused_recurrent_gated_delta_rule(
            case.q, case.k, case.v, g=case.g, beta=case.beta, initial_state=case.state, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return o.flatten(0, 1), state

    return run


def flashinfer_prefill(flashinfer: Any, case: RuleCase) -> Run:
    q, k, v, beta, g = (x.flatten(0, 1) for x in (case.q, case.k, case.v, case.beta.float(), case.g.float()))
    decay, initial_state, out = g.exp(), case.state.mT.contiguous(), torch.empty_like(v)
    final_state, cu_seqlens = torch.empty_like(initial_state), case.sequences[0].long()

    def run() -> tuple[Tensor, Tensor]:
        o, state = flashinfer.prefill.chunk_gated_delta_rule(
            q, k, v, g=decay, beta=beta, scale=q.shape[-1] ** -0.5, initial_state=initial_state,
            output_final_state=True, cu_seqlens=cu_seqlens, output=out, output_state=final_state,
        )  # fmt: skip
        return o, state.mT

    return run


def flashinfer_decode(flashinfer: Any, case: RuleCase, value_first: bool) -> Run:
    """value_first: the one whose states are [N, H, V, K]."""
    decode = flashinfer.decode
    step = decode.gated_delta_rule_decode_pretranspose if value_first else decode.gated_delta_rule_decode
    state, out = case.state.mT.contiguous() if value_first else case.state, torch.empty_like(case.v)

    def run() -> tuple[Tensor, Tensor]:
        o, _ = step(
            case.q, case.k, case.v, state, case.A_log, case.a, case.dt_bias, case.b,
            scale=case.q.shape[-1] ** -0.5, output=out, use_qk_l2norm=True,
        )  # fmt: skip
        return o.flatten(0, 1), state.mT if value_first else state

    return run


def import_flashinfer() -> Any:
    """FlashInfer's Gated DeltaNet: prefill, decode and its version; None where it is not installed, which is said."""
    try:
        import flashinfer
        from flashinfer import gdn_decode, gdn_prefill
    except ImportError as error:
        print(f"FlashInfer is not compared with: {error}")
        return None
    version = getattr(flashinfer, "__version__", None) or importlib.metadata.version("flashinfer-python")
    return SimpleNamespace(prefill=gdn_prefill, decode=gdn_decode, version=version)
