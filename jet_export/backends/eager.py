"""The PyTorch model behind the engine interface: what compiled engines are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch, state_specs
from jet_export.utils.errors import JetExportError
from jet_export.utils.tensors import reading_tensors

if TYPE_CHECKING:  # imports torch's compiler: a second that loading a GPU's packages does not take
    from jet_export.model.jet_nemotron import JetNemotronForCausalLM


class EagerEngine(Engine):
    """The PyTorch model behind the engine interface."""

    def __init__(
        self,
        model: JetNemotronForCausalLM,
        limits: Limits,
        *,
        kv_dtype: torch.dtype | None = None,  # the model's
        state_dtype: torch.dtype = torch.float32,
        state_interval: int = 1,
        rollback: int = 0,
    ) -> None:
        self.model, self.config, self.limits = model, model.config, limits
        self.dtype, self.device = model.dtype, model.device
        self.state_interval, self.rollback, self.mtp = state_interval, rollback, model.mtp is not None
        self.specs = state_specs(
            model.config,
            model.dtype,
            kv_dtype=kv_dtype,
            state_dtype=state_dtype,
            interval=state_interval,
            rollback=rollback,
            hidden=self.mtp,
        )

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        return self.step(input_ids, batch, states, logit_indices, Form.MIXED)

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        return self.step(input_ids, batch, states, None, Form.DECODE)

    @torch.inference_mode()
    def verify(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        if not self.rollback:
            return super().verify(input_ids, batch, states)
        return self.step(input_ids, batch, states, None, Form.VERIFY)

    @torch.inference_mode()
    def predict(
        self, input_ids: Tensor, hidden: Tensor, batch: PackedBatch, logit_indices: Tensor | None, kv_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.model.mtp is None:
            return super().predict(input_ids, hidden, batch, logit_indices, kv_cache)
        form = Form.DECODE if logit_indices is None else Form.MIXED
        out: tuple[Tensor, Tensor] = self.model.mtp(input_ids, hidden, batch, logit_indices, kv_cache, form)
        return out

    def step(
        self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor], logit_indices: Tensor | None, form: Form
    ) -> Tensor:
        interval = self.state_interval
        return self.model.forward_packed(input_ids, batch, states, logit_indices, form, interval=interval).logits


def load_weights(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """weights.safetensors on the engine's device, tied parameters under both names."""
    again = "Build the bundle again."
    with reading_tensors(directory / WEIGHTS, again):
        weights = load_file(directory / WEIGHTS, device=str(manifest.device))
    if "lm_head.weight" not in weights:
        if "embed_tokens.weight" not in weights:
            raise JetExportError(f"{directory / WEIGHTS}: tensor embed_tokens.weight is missing.", again)
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    return weights


def load_eager(directory: str | Path, manifest: Manifest, weights: dict[str, Tensor] | None = None) -> EagerEngine:
    """The eager model that holds a bundle's own weights, FP8 layers included. `weights`: share a loaded copy."""
    from jet_export.model.jet_nemotron import empty_model

    weights = weights if weights is not None else load_weights(Path(directory), manifest)
    dtypes, limits = manifest.dtypes, manifest.limits
    model = empty_model(manifest.config, dtypes.model, torch.device("meta"), limits.max_seq_len)
    if manifest.quantization:
        from jet_export.quantization.quantize import QuantizationReport, apply_report

        apply_report(model, QuantizationReport.from_dict(manifest.quantization))
    if manifest.mtp:
        from jet_export.model.mtp import empty_predictor

        model.mtp = empty_predictor(model)
    again, wanted = "Build the bundle again.", model.state_dict()
    missing = sorted((wanted.keys() | {"cos_sin"}) - weights.keys())
    if missing:
        raise JetExportError(f"{directory}: weight {missing[0]} is missing.", again)
    for name, t in wanted.items():
        if (found := weights[name]).shape != t.shape or found.dtype != t.dtype:
            is_, wants = (f"{x.dtype} {list(x.shape)}" for x in (found, t))
            raise JetExportError(f"{directory}: weight {name} is {is_}, not {wants} as the manifest says.", again)
    table = weights["cos_sin"]
    if table.ndim != 2 or len(table) < limits.max_seq_len or table.shape[1] != model.cos_sin.shape[1]:
        raise JetExportError(f"{directory}: weight cos_sin is not for max_seq_len {limits.max_seq_len}.", again)
    model.load_state_dict({k: weights[k] for k in wanted if k != "cos_sin"}, assign=True)
    if weights["lm_head.weight"] is weights["embed_tokens.weight"]:
        model.lm_head.weight = model.embed_tokens.weight  # one parameter, as in the model that was saved
    model.cos_sin = table
    model.requires_grad_(False)
    return EagerEngine(
        model,
        limits,
        kv_dtype=dtypes.kv_cache,
        state_dtype=dtypes.state,
        state_interval=dtypes.state_interval,
        rollback=dtypes.rollback,
    )
