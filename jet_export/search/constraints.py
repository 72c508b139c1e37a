"""Why a point is refused before anything is built; and whether a measured one meets its targets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isnan

import torch

from jet_export.bundle.dtypes import torch_dtype
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import Memory, engine_memory, parameter_count, weight_bytes
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.model.jet_nemotron import empty_model
from jet_export.search.points import Point
from jet_export.search.space import Space
from jet_export.utils.console import human
from jet_export.utils.errors import JetExportError


@dataclass(frozen=True)
class Scene:
    """What every point of one search shares."""

    preset: JetNemotronConfig
    space: Space
    dtype: torch.dtype
    device_bytes: int | None  # that an engine may take of the device's memory; None: no bound

    @cached_property
    def _preset_bytes(self) -> dict[tuple[str, str], int]:
        return {}

    def memory(self, config: JetNemotronConfig, point: Point, batch: int, context: int | None = None) -> Memory:
        """Of an engine that runs this batch of this context, the target's where none is given."""
        s = self.space
        seq = (context or s.target_context) + s.new_tokens
        limits = Limits(max_batch_size=batch, max_seq_len=seq, prefill_chunk=min(s.prefill_chunk, seq))
        weights = weight_bytes(config, self.dtype, point.fp8)
        kv, state = point.kv_dtype(self.dtype), torch_dtype(point.state_dtype)
        return engine_memory(config, limits, self.dtype, kv, state, weights)

    def cache_bytes(self, config: JetNemotronConfig, point: Point) -> int:
        """Recurrent states and KV caches of one sequence at the target context.

        Without the convolution's last taps: they depend on D alone, are under 30 KB a layer, and differ within the
        paper's table, whose points count as equal. The memory constraint counts them.
        """
        m = self.memory(config, point, 1)
        return m.recurrent_states + m.kv_full + m.kv_window

    def allowed_cache_bytes(self, point: Point) -> int | None:
        if self.space.cache_bytes != "preset":
            return self.space.cache_bytes if isinstance(self.space.cache_bytes, int) else None
        precision = point.state_dtype, point.kv_cache_dtype
        if precision not in self._preset_bytes:
            self._preset_bytes[precision] = self.cache_bytes(self.preset, point)
        return self._preset_bytes[precision]

    def refusal(self, point: Point) -> str | None:
        """Why this point cannot be built or is out of bounds; None where it can and is not."""
        try:
            config = point.config(self.preset, self.space)
        except JetExportError as e:
            return str(e).replace("\n", " ").removeprefix("config: ").rstrip(".")
        return self.kernels(config, point) or self.sizes(config, point)

    def kernels(self, config: JetNemotronConfig, point: Point) -> str | None:
        """What cannot be computed. bf16 points have to fit FP8 too, so that best.json builds with and without it."""
        for i in (i for i, kind in enumerate(config.layer_types) if kind == "jet"):
            dims = config.jet_dims(i)
            if dims.value_dim < config.dconv_generator_reduction:
                return f"layer {i}: D {dims.value_dim} leaves the kernel generator no width"
            if self.dtype == torch.bfloat16:
                reason = fp8_refusal(config.hidden_size, config.dconv_generator_reduction, config.conv_size, dims)
                if reason:
                    return f"layer {i}: {reason}"
        if "swa" in config.layer_types and config.window_size < 1:
            return "swa layers need a window_size"
        return None

    def sizes(self, config: JetNemotronConfig, point: Point) -> str | None:
        cache, allowed = self.cache_bytes(config, point), self.allowed_cache_bytes(point)
        if allowed is not None and cache > allowed:
            excess = 100 * (cache / allowed - 1)
            over = f"{excess:,.0f} % over" if excess >= 10 else f"{excess:.2g} % over"
            return f"cache {human(cache)} a sequence at {self.space.target_context} tokens, {over} {human(allowed)}"
        least, most = self.space.parameters
        parameters = parameter_count(config)
        if not least <= parameters <= most:
            return f"{parameters:,} parameters, outside {least:,.0f} to {most:,.0f}"
        device = self.device_bytes if self.space.gpu_memory == "device" else self.space.gpu_memory
        if isinstance(device, int):
            batch, context = max(self.space.batch), max(self.space.context)
            need = self.memory(config, point, batch, context).total
            if need > device:
                return f"needs {human(need)} at batch {batch} and {context} tokens, the device has {human(device)}"
        return None

    def missed_target(self, decode_ms: float, tokens_per_s: float, prefill_tokens_per_s: float) -> str | None:
        """Which latency or throughput target a point misses."""
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


@lru_cache(maxsize=4096)
def fp8_refusal(hidden_size: int, reduction: int, conv_size: int, dims: JetDims) -> str | None:
    """Why FP8 matrix products cannot take the projections of such a JetBlock."""
    from jet_export.quantization.quantize import check_shapes, select

    config = JetNemotronConfig(
        hidden_size=hidden_size, intermediate_size=16, layer_types=("jet",), num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, jet_num_heads=1, head_k_dim=16, expand_v=1.0, conv_size=conv_size,
        dconv_generator_reduction=reduction, vocab_size=16,
    ).with_jet_dims({0: dims})  # fmt: skip
    model = empty_model(config, torch.bfloat16, torch.device("meta"), 1)
    try:
        check_shapes(model, select(model, (), False)[0])
    except JetExportError as e:
        return f"{dims} in FP8: " + str(e).splitlines()[0].removeprefix("model.layers.0.self_attn.").rstrip(".")
    return None
