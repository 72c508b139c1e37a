"""Tensors of a checkpoint that the model of its config.json does not read: refused where they matter, else named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable

from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8_blocks import SUFFIX, block_size
from jet_export.model.fp8_checkpoint import kv_scale_names, scale_names
from jet_export.model.qwen3_5 import LEFT_OUT, MTP, TEXT, left_out
from jet_export.utils.errors import JetExportError, JetExportWarning

LAYER = re.compile(r"model\.layers\.(\d+)\.")
NO_EFFECT = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # a buffer of old releases, computed here from rope_theta


def check_unread(
    c: JetNemotronConfig, layout: Collection[str], names: Iterable[str], where: str, *, mtp: bool = False
) -> None:
    """Raise JetExportError for a tensor of a layer that config.json does not have, or a bias that it has not; warn of
    others, by name. `layout`: the published names that are read; `names`: the checkpoint's; `mtp`: the
    multi-token-prediction layer is read by others."""
    read = {*layout, *(s for name in layout for s in scale_names(name)), *kv_scale_names(c)}
    if block_size(c, where):
        read |= {name + SUFFIX for name in layout}
    if c.tie_word_embeddings:
        read |= {"lm_head.weight", *scale_names("lm_head.weight")}  # a copy of the embeddings
    elsewhere = MTP if mtp else ()
    unread = sorted(n for n in set(names) - read if not NO_EFFECT.search(n) and not n.startswith(elsewhere))
    if c.model_type == TEXT and (parts := left_out(unread)):
        warnings.warn(f"{where}: left out: {parts}. Text alone is run.", JetExportWarning, stacklevel=3)
        unread = [name for name in unread if not name.startswith(tuple(LEFT_OUT))]
    for name in unread:
        found = LAYER.match(name)
        if found and int(found[1]) >= c.num_hidden_layers:
            raise JetExportError(
                f"{where}: tensor {name} is of layer {found[1]}, and config.json has {c.num_hidden_layers} layers.",
                "Use the config.json that belongs to these weights (num_hidden_layers, layer_types).",
            )
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in layout:
            raise JetExportError(
                f"{where}: tensor {name} is there, and config.json describes a model without it.",
                "Without that bias the logits would be wrong. Use the config.json that belongs to these weights.",
            )
    if unread:
        more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
        text = f"{where}: tensors that are not read: {', '.join(unread[:8])}{more}."
        warnings.warn(text, JetExportWarning, stacklevel=3)
