"""The state mapping in numbers: `python -m jet_export.trtllm.sizes` prints docs/backends/tensorrt-llm.md's tables."""

from __future__ import annotations

import math

import torch

from jet_export.model.config import JetNemotronConfig
from jet_export.model.presets import jet_2b, jet_4b
from jet_export.trtllm.adapt import hybrid_fields
from jet_export.trtllm.engine_flow import recurrent_fields
from jet_export.utils.console import human


def state_shapes(c: JetNemotronConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ssm state, conv state) of one slot, by the formula of TensorRT-LLM's cache manager."""
    f = hybrid_fields(c)
    conv_dim = f["mamba_num_heads"] * f["mamba_head_dim"] + 2 * f["n_groups"] * f["ssm_state_size"]
    ssm = (f["mamba_num_heads"], f["mamba_head_dim"], f["ssm_state_size"])
    return ssm, (conv_dim, f["conv_kernel"] - 1)


def rows(c: JetNemotronConfig) -> dict[str, str]:
    f, (ssm, conv) = hybrid_fields(c), state_shapes(c)
    layers = f["hybrid_override_pattern"].count("M")
    attention = c.num_hidden_layers - layers
    ssm_bytes, conv_bytes = math.prod(ssm) * torch.float32.itemsize, math.prod(conv) * torch.bfloat16.itemsize
    kv = 2 * c.num_key_value_heads * c.head_dim * torch.bfloat16.itemsize
    return {
        "layers with states; with a KV cache": f"{layers}; {attention}",
        "`mamba_num_heads`, `mamba_head_dim`, `ssm_state_size`": ", ".join(map(str, ssm)),
        "`conv_kernel`, `n_groups`": f"{f['conv_kernel']}, {f['n_groups']}",
        "ssm state of a layer, fp32": f"[slots, {', '.join(map(str, ssm))}], {ssm_bytes:,} bytes a slot",
        "conv state of a layer, bf16": f"[slots, {', '.join(map(str, conv))}], {conv_bytes:,} bytes a slot",
        "states of a sequence, all layers": human(layers * (ssm_bytes + conv_bytes)),
        "KV cache of a token, all layers, bf16": human(attention * kv),
    }


def legacy_rows(c: JetNemotronConfig) -> dict[str, str]:
    """The fields of an engine-flow config.json and the states they make."""
    f = recurrent_fields(c)
    kinds = [f"{f['layer_types'].count(kind)} {kind}" for kind in ("recurrent", "attention")]
    rnn = (f["rnn_hidden_size"] // f["rnn_head_size"], f["state_size"], f["rnn_head_size"])
    sizes = ("state_size", "conv_kernel", "rnn_hidden_size", "rnn_head_size", "rnn_conv_dim_size")
    return {
        "`layer_types`": ", ".join(kinds),
        **{f"`{name}`": str(f[name]) for name in sizes},
        "rnn state of a slot, fp32": str(list(rnn)),
        "conv state of a slot, bf16": str([f["conv_kernel"] - 1, f["rnn_conv_dim_size"]]),
    }


def tables() -> list[str]:
    """Markdown: the PyTorch backend's, an empty line, the engine flow's."""
    out: list[str] = []
    for make in (rows, legacy_rows):
        columns = {"jet-2b": make(jet_2b()), "jet-4b": make(jet_4b())}
        out += [f"| | {' | '.join(columns)} |", "|---|---|---|"]
        out += [f"| {name} | {' | '.join(c[name] for c in columns.values())} |" for name in columns["jet-2b"]]
        out.append("")
    return out[:-1]


if __name__ == "__main__":
    print("\n".join(tables()))
