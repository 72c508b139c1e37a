"""The bounds of a space: why a point is refused before anything is built, and which target a measured one misses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isnan

import torch

from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import Memory, engine_memory, parameter_count, weight_bytes
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.model.jet_nemotron import empty_model
from jet_export.search.points import Point
from jet_export.search.space import Space
from jet_export.utils.console import human
from jet_export.utils.errors import JetExportError


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """The bounds that the points of one search have to keep."""

    preset: JetNemotronConfig
    space: Space
    dtype: torch.dtype
    device_bytes: int | None  # device memory that an engine may take; None: unbounded

    @cached_property
    def _preset_bytes(self) -> dict[tuple[str, str], int]:
        """Cache bytes of the preset by state and KV cache dtype."""
        return {}

    def memory(self, config: JetNemotronConfig, point: Point, *, batch: int, context: int | None = None) -> Memory:
        """Of an engine for this batch and context (default: the target's)."""
        s = self.space
        seq = (context or s.target_context) + s.new_tokens
        limits = Limits(max_batch_size=batch, max_seq_len=seq, prefill_chunk=min(s.prefill_chunk, seq))
        weights = weight_bytes(config, self.dtype, point.fp8)
        return engine_memory(config, limits, point.dtypes(self.dtype), weights)

    def cache_bytes(self, config: JetNemotronConfig, point: Point) -> int:
        """Recurrent states and KV caches of one sequence at the target context.

        Convolution states are left out: they depend on D alone, are under 30 KB a layer, and differ between the points
        of the paper's table, which count as equal. The memory constraint includes them.
        """
        m = self.memory(config, point, batch=1)
        return m.recurrent_states + m.kv_full + m.kv_window

    def allowed_cache_bytes(self, point: Point) -> int | None:
        """The bound at the point's precision; None: unbounded."""
        if self.space.cache_bytes != "preset":
            return self.space.cache_bytes if isinstance(self.space.cache_bytes, int) else None
        precision = point.state_dtype, point.kv_cache_dtype
        if precision not in self._preset_bytes:
            self._preset_bytes[precision] = self.cache_bytes(self.preset, point)
        return self._preset_bytes[precision]

    def refusal(self, point: Point) -> str | None:
        """Why the point cannot be built or is out of bounds; None if neither."""
        try:
            config = point.config(self.preset, self.space)
        except JetExportError as e:
            return str(e).replace("\n", " ").removeprefix("config: ").rstrip(".")
        return self.kernel_refusal(config) or self.size_refusal(config, point)

    def kernel_refusal(self, config: JetNemotronConfig) -> str | None:
        """What the kernels cannot compute. bf16 points have to fit FP8 too, so that best.json builds either way."""
        for i, kind in enumerate(config.layer_types):
            if kind != "jet":
                continue
            dims = config.jet_dims(i)
            if dims.value_dim < config.dconv_generator_reduction:
                return f"layer {i}: D {dims.value_dim} leaves the kernel generator no width"
            if self.dtype == torch.bfloat16 and (reason := fp8_refusal(one_jet_layer(config, dims))):
                return f"layer {i}: {reason}"
        if "swa" in config.layer_types and config.window_size < 1:
            return "swa layers need a window_size"
        return None

    def size_refusal(self, config: JetNemotronConfig, point: Point) -> str | None:
        cache, allowed = self.cache_bytes(config, point), self.allowed_cache_bytes(point)
        if allowed is not None and cache > allowed:
            excess = 100 * (cache / allowed - 1)
            over = f"{excess:,.0f} % over" if excess >= 10 else f"{excess:.2g} % over"
            return f"cache {human(cache)} a sequence at {self.space.target_context} tokens, {over} {human(allowed)}"
        least, most = self.space.parameters
        parameters = parameter_count(config)
        if not least <= parameters <= most:
            return f"{parameters:,} parameters, outside {least:,.0f} to {most:,.0f}"
        return self.memory_refusal(config, point)

    def memory_refusal(self, config: JetNemotronConfig, point: Point) -> str | None:
        """At the largest batch and context that are measured."""
        available = self.device_bytes if self.space.gpu_memory == "device" else self.space.gpu_memory
        if not isinstance(available, int):
            return None
        batch, context = max(self.space.batch), max(self.space.context)
        needed = self.memory(config, point, batch=batch, context=context).total
        if needed <= available:
            return None
        return f"needs {human(needed)} at batch {batch} and {context} tokens, the device has {human(available)}"

    def missed_target(self, *, decode_ms: float, tokens_per_s: float, prefill_tokens_per_s: float) -> str | None:
        """Which latency or throughput target these figures miss; None if they meet all."""
        s = self.space
        if s.decode_ms is not None and decode_ms > s.decode_ms:
            return f"decode step {decode_ms:.3g} ms, target {s.decode_ms:g}"
        if s.tokens_per_s is not None and tokens_per_s < s.tokens_per_s:
            return f"{tokens_per_s:,.0f} tokens/s, target {s.tokens_per_s:,.0f}"
        if s.prefill_tokens_per_s is not None and isnan(prefill_tokens_per_s):
            return f"prefill: not known, target {s.prefill_tokens_per_s:,.0f} tokens/s"
        if s.prefill_tokens_per_s is not None and prefill_tokens_per_s < s.prefill_tokens_per_s:
            return f"prefill {prefill_tokens_per_s:,.0f} tokens/s, target {s.prefill_tokens_per_s:,.0f}"
        return None


def one_jet_layer(config: JetNemotronConfig, dims: JetDims) -> JetNemotronConfig:
    """A model of one JetBlock of these sizes; what its projections do not depend on is set to one value."""
    return JetNemotronConfig(
        hidden_size=config.hidden_size,
        intermediate_size=16,
        layer_types=("jet",),
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        jet_num_heads=1,
        head_k_dim=16,
        expand_v=1.0,
        conv_size=config.conv_size,
        dconv_generator_reduction=config.dconv_generator_reduction,
        vocab_size=16,
        bos_token_id=0,
        eos_token_id=0,
    ).with_jet_dims({0: dims})


@lru_cache(maxsize=4096)
def fp8_refusal(config: JetNemotronConfig) -> str | None:
    """Why FP8 matrix products cannot take the projections of this one JetBlock."""
    from jet_export.quantization.quantize import check_shapes, select

    model = empty_model(config, torch.bfloat16, torch.device("meta"), 1)
    try:
        check_shapes(model, select(model, (), False)[0])
    except JetExportError as e:
        reason = str(e).splitlines()[0].removeprefix("model.layers.0.self_attn.").rstrip(".")
        return f"{config.jet_dims(0)} in FP8: {reason}"
    return None
