"""A case's attributes and input shapes, as a graph would give them."""

from typing import Any

from helpers.eager_bundle import mini_config
from helpers.paths import ROOT
from helpers.qwen import short_qwen
from jet_export.kernels.form import Form
from jet_export.ladder.inputs import attributes_of
from jet_export.plugins.cases import AttentionCase, Case, JetBlockCase, model_cases

JET_TINY = ROOT / "jet_export/data/jet-tiny/config.json"
MINI: list[Case] = [
    JetBlockCase(2, 32, 48, 4, "bfloat16", "bfloat16"),
    AttentionCase(4, 2, 32, 16, 40, "bfloat16", "float8_e4m3fn"),
]
# Step buffers, drafts, shared key heads and a static convolution, a partial rotary embedding; fp32, which Triton's
# interpreter computes rightly.
BUFFER: dict[str, Any] = {"interval": 2, "rollback": 2}
BUFFERED_CONFIGS = {  # the models of these cases
    "jet": mini_config(layer_types=["jet"], num_hidden_layers=1),
    "qwen3_5": short_qwen(),
}
BUFFERED: list[Case] = [c for m in BUFFERED_CONFIGS.values() for c in model_cases(m, dtype="float32", **BUFFER)]


def node_of(case: Case) -> str:
    return "JetBlock" if isinstance(case, JetBlockCase) else "Attention"


def fields_of(case: Case, form: Form = Form.MIXED) -> dict[str, Any]:
    scales = {} if isinstance(case, JetBlockCase) else {"k_scale": 0.25, "v_scale": 0.5}
    return attributes_of(case, form) | scales


def inputs_of(case: Case, T: int, N: int, extra: int = 32, M: int = 9, P: int = 500) -> list[tuple[str, list[int]]]:
    """(dtype, shape) of the inputs. `extra`: columns of qkuz behind the gate; M: of block_table; P: of positions."""
    if isinstance(case, JetBlockCase):
        shapes = case.shapes(T, N, N + 2, case.columns + extra)
    else:
        shapes = case.shapes(T, N, N * M + 3, M, P)
    return [(dtype, list(shape)) for dtype, shape in zip(case.dtypes, shapes, strict=True)]
