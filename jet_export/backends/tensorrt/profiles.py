"""The two optimisation profiles of the graph: the sizes that its inputs may have in prefill and in decode.

For every size of every input TensorRT takes (minimum, optimum, maximum), which determine kernels, workspace, and the
shapes that a call may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jet_export.bundle.limits import Limits
from jet_export.model.cache import pages_per_sequence
from jet_export.model.config import JetNemotronConfig

Sizes = tuple[int, int, int]  # minimum, optimum, maximum
Shapes = dict[str, list[tuple[int, ...]]]  # input -> its minimum, optimum and maximum shape

NAMES = ("prefill", "decode")  # by number
ROWS = 4  # sequences of verify's steps, whatever the limits
POOLS = 8  # a pool may have so many times the rows that the limits need, for the prefix cache and --kv-tokens
LOGITS = 128  # most rows of logits that verify asks for
SMALL_TOKENS = 32


def sizes(config: JetNemotronConfig, limits: Limits, decode: bool) -> dict[str, Sizes]:
    """The graph's dynamic sizes, by name."""
    n, chunk = limits.max_batch_size, limits.prefill_chunk
    rows = max(n, ROWS)
    sequences = rows if decode else rows + 1  # a captured call has one of padding, see runtime/calls.py
    pages, ring = pages_per_sequence(config, limits.max_seq_len, chunk)
    tokens = max(limits.max_prefill_tokens, SMALL_TOKENS)
    return {
        "sequences": (1, n if decode else min(n, 4), sequences),
        "tokens": (1, n, rows) if decode else (1, min(chunk, tokens), tokens),
        "outputs": (1, n, rows) if decode else (1, min(n, 4), min(tokens, max(chunk, rows, LOGITS))),
        "table_pages": (1, pages, pages),
        "ring_pages": (1, ring, ring),
        "slots": (1, n, POOLS * rows),
        "pages": (1, n * pages, POOLS * rows * pages),
        "window_pages": (1, n * ring, POOLS * rows * ring),
    }


def graph_inputs(graph: Path) -> dict[str, list[int | str]]:
    """Input -> its sizes, as numbers or names ("sequences + 1")."""
    import onnx

    inputs = onnx.load(graph, load_external_data=False).graph.input
    return {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in inputs}


def shapes(inputs: Mapping[str, list[int | str]], known: Mapping[str, Sizes]) -> Shapes:
    """Each input's minimum, optimum and maximum shape."""
    out: Shapes = {}
    for name, dims in inputs.items():
        per_dim = [_size(d, known) for d in dims]
        out[name] = [tuple(size[i] for size in per_dim) for i in range(3)]
    return out


def _size(dim: int | str, known: Mapping[str, Sizes]) -> Sizes:
    if isinstance(dim, int):
        return dim, dim, dim
    name, _, more = dim.partition(" + ")
    low, likely, high = known[name]
    extra = int(more or 0)
    return low + extra, likely + extra, high + extra


def profiles(graph: Path, config: JetNemotronConfig, limits: Limits) -> list[Shapes]:
    """The shapes of each profile, in the order of NAMES."""
    inputs = graph_inputs(graph)
    return [shapes(inputs, sizes(config, limits, decode=name == "decode")) for name in NAMES]
