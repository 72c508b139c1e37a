"""Qwen3.5's multi-token-prediction layer, as a checkpoint has it beside the model (mtp.*): what comes after the next
token, from the model's last hidden state and that token.

    x_t = fc([norm_e(embed(token_{t+1})) | norm_h(h_t)])       h_t: the model's, behind its last norm
    h'_t = norm(layer(x_t))                                    one layer of gated attention, with a KV cache of its own
    logits of token_{t+2} = lm_head(h'_t)                      embed and lm_head are the model's

To go on by a token, h'_t takes the place of h_{t+1}. Keys are rotated by t; since only distances count, t + 1 would be
the same. transformers leaves the layer out. Source: DeepSeek-V3, arXiv 2412.19437, section 2.2; for the order in fc and
which hidden state it is, vLLM's qwen3_5_mtp.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch
from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import DecoderLayer, JetNemotronForCausalLM, randomize
from jet_export.model.layout import Slice, attention_layer, norm_slice
from jet_export.model.linear import normed
from jet_export.model.qwen3_5 import MTP, TEXT
from jet_export.model.rms_norm import RMSNorm
from jet_export.model.weights import CheckpointFiles, fill
from jet_export.utils.errors import JetExportError, shown


class MultiTokenPredictor(nn.Module):
    """The layer of one model, whose embedding, output projection and rotary table it uses."""

    def __init__(self, model: JetNemotronForCausalLM) -> None:
        super().__init__()
        c = model.config
        self.config = own_config(c)
        self.shared = (model,)  # a tuple: no submodule
        self.pre_fc_norm_embedding = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)  # of [embedding | hidden]
        self.layer = DecoderLayer(self.config, 0)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    @classmethod
    def from_pretrained(cls, directory: str | Path, model: JetNemotronForCausalLM) -> MultiTokenPredictor:
        """That of the checkpoint in `directory`, of which `model` was loaded.

        Raises JetExportError if it has none, or one that is not run here."""
        files = CheckpointFiles.open(directory)
        check_predictor(files)
        predictor = empty_predictor(model)
        params: dict[str, Tensor] = dict(predictor.named_parameters())
        fill(files, predictor_layout(files.config), params)
        return predictor

    def forward(
        self,
        tokens: Tensor,  # [T] int, each the token behind its hidden state's
        hidden: Tensor,  # [T, hidden]
        batch: PackedBatch,
        logit_indices: Tensor | None,  # [M] int32 rows to return; None: all
        kv_cache: Tensor,  # updated in place
        form: Form,
    ) -> tuple[Tensor, Tensor]:  # logits [M, vocab] and h' [M, hidden]
        (model,) = self.shared
        pair = [self.pre_fc_norm_embedding(model.embed_tokens(tokens)), self.pre_fc_norm_hidden(hidden)]
        h = self.layer(self.fc(torch.cat(pair, 1)), model.cos_sin, batch, (kv_cache,), form)
        h = normed(h if logit_indices is None else h.index_select(0, logit_indices), self.norm)
        return model.lm_head(h), h


def own_config(c: JetNemotronConfig) -> JetNemotronConfig:
    """Of the layer alone."""
    return replace(c, layer_types=("attn",), jet_layers=())


def empty_predictor(model: JetNemotronForCausalLM) -> MultiTokenPredictor:
    """With uninitialised parameters, on the model's device."""
    with torch.device("meta"):
        predictor = MultiTokenPredictor(model)
    predictor.requires_grad_(False)
    for name, p in predictor.named_parameters():
        p.data = p.data.to(torch.float32 if model.config.norm_offset and "norm" in name else model.dtype)
    return predictor.to_empty(device=model.device).eval()


def random_predictor(model: JetNemotronForCausalLM, seed: int) -> MultiTokenPredictor:
    """With random weights, as the model's own."""
    predictor = empty_predictor(model)
    randomize(predictor, model.config, seed)
    return predictor


def check_predictor(files: CheckpointFiles) -> None:
    """Raise JetExportError unless the checkpoint has a multi-token-prediction layer that is run here."""
    c, names = files.config, [name for name in files.file_of if name.startswith(MTP)]
    where = f"{files.directory}: multi-token prediction"
    if c.model_type != TEXT or not names:
        raise JetExportError(f"{where}: the checkpoint has no mtp.* tensors.", "Draft by prompt lookup, or a bundle.")
    layers, own = c.raw.get("mtp_num_hidden_layers", 1), c.raw.get("mtp_use_dedicated_embeddings", False)
    if layers != 1 or own:
        what = "embeddings of its own" if own else f"{shown(layers)} layers"
        raise JetExportError(f"{where}: it has {what}.", "One layer that shares the model's embeddings is run here.")
    layout = predictor_layout(c)
    missing, unread = layout.keys() - set(names), [n for n in names if n not in layout and "_scale" not in n]
    for what, found in (("is missing", sorted(missing)), ("is not known here", sorted(unread))):
        if found:
            raise JetExportError(f"{where}: tensor {found[0]} {what}.", "One layer of gated attention is run here.")


def predictor_layout(c: JetNemotronConfig) -> dict[str, Slice]:
    """Published tensor name -> the rows of our parameter that it fills."""
    d, out = c.hidden_size, dict[str, Slice]()
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        norm_slice(out, c, f"{name}.weight", f"{MTP}{name}.weight", d)
    out[f"{MTP}fc.weight"] = Slice("fc.weight", 0, (d, 2 * d))
    attention_layer(out, own_config(c), "layer", f"{MTP}layers.0")
    return out
