"""A mixed call equals, bit for bit, the decode call of its single tokens and the prefill call of the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jet_export.kernels.attention import attention_ref, attention_triton
from jet_export.kernels.form import Form
from jet_export.kernels.gated_delta_rule import gated_delta_rule_triton, packed_gated_delta_rule_ref
from jet_export.kernels.jet_block import jet_block_ref, jet_block_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENS, HELD = [1, 3, 1, 18, 1, 2], [7, 4, 0, 5, 30, 0]  # of six sequences, the second and the third of which are padding
POOLS = ("conv_state", "recurrent_state", "kv_cache")


def mixed_inputs() -> dict[str, dict[str, Any]]:
    """Inputs of each op, by its name."""
    rng = torch.Generator().manual_seed(5)
    T, N, H, K, V, W, page, Dh = sum(LENS), len(LENS), 2, 16, 16, 4, 16, 16
    common = {
        "cu_seqlens": torch.tensor([0, *torch.tensor(LENS).cumsum(0).tolist()], dtype=torch.int32),
        "slots": torch.tensor([4, -1, -1, 0, 2, 6], dtype=torch.int32),
        "context_lens": torch.tensor(HELD, dtype=torch.int32),
    }

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    angle = torch.arange(64)[:, None] * 1e4 ** (-torch.arange(0, Dh, 2) / Dh)
    block = {
        "qkuz": rand(T, 2 * H * (K + V)),
        "ba": rand(T, 2 * H),
        "kappa": rand(T, H * V * W),
        "A_log": rand(H),
        "dt_bias": rand(H) - 3,
        "w_o": rand(V),
        "conv_state": rand(8, W - 1, H * V),
        "recurrent_state": rand(8, H, K, V),
    }
    rule = {
        "q": rand(T, H, K),
        "k": rand(T, H, K),
        "v": rand(T, H, V),
        "beta": rand(T, H).sigmoid(),
        "g": -rand(T, H).abs(),
        "recurrent_state": rand(8, H, K, V),
    }
    attention = {
        "qkv": rand(T, 4 * Dh),
        "cos_sin": torch.cat([angle.cos(), angle.sin()], 1),
        "kv_cache": rand(3 * N, 2, 1, page, Dh),
        "block_table": torch.randperm(3 * N, generator=rng).view(N, 3).int(),
    }
    return {
        "jet_block": {**block, **common, "sizes": (H, K, V, 1e-5)},
        "gated_delta_rule": {**rule, **common, "sizes": ()},
        "attention": {**attention, **common, "sizes": (2, 1, Dh, 0, 1.0, 1.0)},
    }


def call(op: Callable[..., Tensor], inputs: dict[str, Any], form: Form) -> Tensor:
    tensors = [t.to(DEVICE) if n not in POOLS else t for n, t in inputs.items() if n != "sizes"]
    return op(*tensors, *inputs["sizes"], form).cpu()


def part(inputs: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The inputs of these sequences alone, over the same pools."""
    bounds = inputs["cu_seqlens"].tolist()
    tokens = [t for n in chosen for t in range(bounds[n], bounds[n + 1])]
    lens = torch.tensor([LENS[n] for n in chosen])
    out = dict(inputs)
    for name, value in inputs.items():
        if name in ("slots", "context_lens", "block_table"):
            out[name] = value[chosen]
        elif name not in ("sizes", *POOLS) and len(value) == sum(LENS):
            out[name] = value[tokens]
    out["cu_seqlens"] = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).int()
    return out


def attention_reference(*args: Any) -> Tensor:
    return attention_ref(*args[:-1])


OPS: dict[str, list[Callable[..., Tensor]]] = {
    "jet_block": [jet_block_ref, jet_block_triton],
    "gated_delta_rule": [packed_gated_delta_rule_ref, gated_delta_rule_triton],
    "attention": [attention_reference, attention_triton],
}


@pytest.mark.parametrize("kernels", [False, True], ids=["ref", "kernel"])
@pytest.mark.parametrize("name", OPS)
def test_a_mixed_call_is_a_decode_and_a_prefill_call(name: str, kernels: bool) -> None:
    if DEVICE == "cuda" and not kernels:
        pytest.skip("the references run on a CPU")
    op, inputs = OPS[name][kernels], mixed_inputs()[name]
    device = DEVICE if kernels else "cpu"
    whole = {n: t.clone().to(device) if n in POOLS else t for n, t in inputs.items()}
    apart = {n: t.clone().to(device) if n in POOLS else t for n, t in inputs.items()}
    out = call(op, whole, Form.MIXED)
    bounds = inputs["cu_seqlens"].tolist()
    for form, chosen in ((Form.DECODE, [0, 2, 4]), (Form.PREFILL, [1, 3, 5])):
        rows = [t for n in chosen for t in range(bounds[n], bounds[n + 1])]
        assert torch.equal(out[rows], call(op, part(apart, chosen), form)), form
    assert all(torch.equal(whole[n], apart[n]) for n in POOLS if n in inputs)
    assert any(not torch.equal(whole[n].cpu(), inputs[n]) for n in POOLS if n in inputs)
