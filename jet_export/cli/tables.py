"""Descriptions that several commands print: an architecture, the memory of an engine."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from jet_export.bundle.memory import Memory, parameter_count
from jet_export.model.config import JetNemotronConfig
from jet_export.model.qwen3_5 import PUBLISHED_KINDS, TEXT
from jet_export.utils.console import human


def architecture(c: JetNemotronConfig) -> str:
    """Parameters and layers in a line, by the names that config.json has for them."""
    names = PUBLISHED_KINDS if c.model_type == TEXT else {}
    kinds = Counter(names.get(kind, kind) for kind in c.layer_types)
    layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return f"{parameter_count(c) / 1e6:,.1f} M parameters; layers: {layers}"


def memory_table(m: Memory) -> Table:
    """An engine's memory by use."""
    table = Table(box=None, header_style="bold")
    table.add_column("memory")
    table.add_column("bytes", justify="right")
    for name, value in (
        ("weights", m.weights),
        ("recurrent states", m.recurrent_states),
        ("convolution states", m.conv_states),
        ("KV cache, full attention", m.kv_full),
        ("KV cache, sliding windows", m.kv_window),
        ("RoPE table", m.rope_table),
        ("workspace of a prefill step (estimate)", m.workspace),
        ("total", m.total),
    ):
        table.add_row(name, human(value))
    return table
