"""A case's attributes and input shapes, as a graph would give them."""

from typing import Any

from helpers.paths import ROOT
from jet_export.kernels.form import Form
from jet_export.plugins.cases import AttentionCase, Case, JetBlockCase

JET_TINY = ROOT / "jet_export/data/jet-tiny/config.json"
MINI: list[Case] = [
    JetBlockCase(2, 32, 48, 4, "bfloat16", "bfloat16"),
    AttentionCase(4, 2, 32, 16, 40, "bfloat16", "float8_e4m3fn"),
]


def fields_of(case: Case) -> dict[str, Any]:
    if isinstance(case, JetBlockCase):
        return {
            "num_heads": case.num_heads,
            "head_k_dim": case.head_k_dim,
            "head_v_dim": case.head_v_dim,
            "norm_eps": 1e-5,
            "form": int(Form.MIXED),
        }
    return {
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "window": case.window,
        "k_scale": 0.25,
        "v_scale": 0.5,
        "form": int(Form.MIXED),
    }


def inputs_of(case: Case, T: int, N: int, extra: int = 32, M: int = 9, P: int = 500) -> list[tuple[str, list[int]]]:
    """(dtype, shape) of the inputs. `extra`: columns of qkuz behind the gate; M: of block_table; P: of positions."""
    rows = [("int32", [N + 1]), ("int32", [N]), ("int32", [N])]
    if isinstance(case, JetBlockCase):
        H, K, V, W = case.num_heads, case.head_k_dim, case.head_v_dim, case.conv_size
        x = case.dtype
        return [
            (x, [T, 2 * H * (K + V) + extra]),
            (x, [T, 2 * H]),
            (x, [T, H * V * W]),
            ("float32", [H]),
            ("float32", [H]),
            (x, [V]),
            (x, [N + 2, W - 1, H * V]),
            (case.state_dtype, [N + 2, H, K, V]),
            *rows,
        ]
    Hq, Hkv, Dh = case.num_heads, case.num_kv_heads, case.head_dim
    return [
        (case.dtype, [T, (Hq + 2 * Hkv) * Dh]),
        (case.dtype, [P, Dh]),
        (case.cache_dtype, [N * M + 3, 2, Hkv, case.page, Dh]),
        ("int32", [N, M]),
        *rows,
    ]
