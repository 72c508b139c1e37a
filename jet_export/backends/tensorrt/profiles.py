"""The optimisation profiles of the graphs: the sizes that their inputs may have.

One engine has the profiles of prefill and decode, another that of calls that verify drafts.

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
VERIFY_NAMES = ("verify",)  # of the engine of verify.onnx
ROWS = 4  # sequences of verify's steps, whatever the limits
POOLS = 8  # a pool may have so many times the rows that the limits need, for the prefix cache and --kv-tokens
LOGITS = 128  # most rows of logits that verify asks for
SMALL_TOKENS = 32
ROUNDED = 16  # tokens; a captured call that verifies has two a sequence and so many more at most, see verify_calls.py


def sizes(config: JetNemotronConfig, limits: Limits, mode: str, rollback: int = 0) -> dict[str, Sizes]:
    """The graph's dynamic sizes, by name. `mode`: one of NAMES and VERIFY_NAMES; `rollback`: as a manifest's."""
    n, chunk = limits.max_batch_size, limits.prefill_chunk
    rows = max(n, ROWS)
    pages, ring = pages_per_sequence(config, limits.max_seq_len, chunk)
    tokens = max(limits.max_prefill_tokens, SMALL_TOKENS)
    calls: dict[str, tuple[Sizes, Sizes, Sizes]] = {  # sequences, tokens, outputs; padding rows included
        "decode": ((1, n, rows), (1, n, rows), (1, n, rows)),
        "prefill": (
            (1, min(n, 4), rows + 1),
            (1, min(chunk, tokens), tokens),
            (1, min(n, 4), min(tokens, max(chunk, rows, LOGITS))),
        ),
        "verify": (
            (1, n, 2 * rows),
            (1, n * rollback, rows * (rollback + 2) + ROUNDED),
            (1, n * rollback, rows * (rollback + 2) + ROUNDED),
        ),
    }
    return {
        **dict(zip(("sequences", "tokens", "outputs"), calls[mode], strict=True)),
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


def profiles(
    graph: Path, config: JetNemotronConfig, limits: Limits, names: tuple[str, ...] = NAMES, rollback: int = 0
) -> list[Shapes]:
    """The shapes of each profile, in the order of `names`."""
    inputs = graph_inputs(graph)
    return [shapes(inputs, sizes(config, limits, name, rollback)) for name in names]
