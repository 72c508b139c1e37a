"""Random inputs of a jet node, and the results of the torch op and of its reference on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jet_export.kernels.attention import attention_ref
from jet_export.kernels.form import Form
from jet_export.kernels.jet_block import jet_block_ref
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.plugins.cases import AttentionCase, Case, JetBlockCase

BATCH = {
    "JetBlock": {"cu_seqlens": 8, "slots": 9, "context_lens": 10},
    "JetAttention": {"block_table": 3, "cu_seqlens": 4, "slots": 5, "context_lens": 6},
}
# New tokens of each sequence, and tokens held; they run in the form MIXED. The second sequence of a batch is padding.
RUNS: dict[str, tuple[list[int], list[int]]] = {
    "prefill": ([200], [0]),
    "ragged prefill": ([1, 63, 64, 65, 130], [0, 9, 0, 0, 0]),
    "chunk of a longer prompt": ([64, 17, 30], [192, 5, 7]),
    "chunk past the window": ([70, 3, 1], [2300, 1151, 128]),
    "decode": ([1, 1, 1, 1, 1], [9, 130, 64, 0, 300]),
    "decode past the window": ([1, 1, 1], [2400, 7, 1500]),
}
VERIFY_CONTEXT = [70, 1, 9]  # tokens held by the sequences of a call that verifies drafts
SMALLEST, LARGEST = -(2**31), 2**31 - 1
HOSTILE = ("any", "near", "falling", "smallest", "largest")


def node_of(case: Case) -> str:
    return "JetBlock" if isinstance(case, JetBlockCase) else "JetAttention"


def verify_run(case: Case) -> tuple[list[int], list[int]]:
    """New tokens of each sequence and tokens held, of a call that verifies drafts."""
    most = case.rollback
    return [most, 1, max(1, most - 1)], VERIFY_CONTEXT


def attributes_of(case: Case, form: Form = Form.MIXED) -> dict[str, Any]:
    """The node's attributes in a graph."""
    if isinstance(case, JetBlockCase):
        return {
            "num_heads": case.num_heads,
            "head_k_dim": case.head_k_dim,
            "head_v_dim": case.head_v_dim,
            "norm_eps": 1e-5,
            "form": int(form),
            **({"interval": case.interval} if case.buffer_rows else {}),
        }
    fp8 = case.cache_dtype == "float8_e4m3fn"
    return {
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "window": case.window,
        "k_scale": 0.25 if fp8 else 1.0,
        "v_scale": 0.5 if fp8 else 1.0,
        "form": int(form),
    }


@dataclass
class NodeInputs:
    """A node's inputs, in the node's order."""

    case: Case
    tensors: list[Tensor]
    attributes: dict[str, Any]

    @property
    def node(self) -> str:
        return node_of(self.case)

    def states(self) -> list[Tensor]:
        return [self.tensors[i] for i in self.case.states]

    def results_of(self, function: Any, tensors: list[Tensor]) -> list[Tensor]:
        """What a function with the op's arguments returns for these tensors, and the states after it."""
        values = dict(self.attributes)
        interval = values.pop("interval", 1)
        beside: tuple[Any, ...] = ()
        if self.node == "JetBlock":
            beside = *((*tensors[11:], interval) if tensors[11:] else NO_BUFFER), None
        return [function(*tensors[:11], *values.values(), *beside), *(tensors[i] for i in self.case.states)]

    def op(self) -> list[Tensor]:
        """The torch op's output, and the states after it. The inputs are not changed."""
        op = torch.ops.jet.jet_block if self.node == "JetBlock" else torch.ops.jet.attention
        return self.results_of(op, [t.clone() for t in self.tensors])

    def reference(self) -> list[Tensor]:
        """The reference's output, and the states after it, on the CPU."""

        def attend(*args: Any) -> Tensor:
            return attention_ref(*args[:-1])  # it is the same in every form

        reference = jet_block_ref if self.node == "JetBlock" else attend
        return self.results_of(reference, [t.cpu().clone() for t in self.tensors])

    def hostile(self, kind: str, seed: int) -> NodeInputs:
        """The same inputs with invalid batch tensors and positions; `kind` is one of HOSTILE."""
        tensors = list(self.tensors)
        beside = [12] if len(tensors) > 12 else []  # state_position
        for i in (*BATCH[self.node].values(), *beside):
            tensors[i] = hostile_integers(kind, tensors[i], seed + i)
        return NodeInputs(self.case, tensors, self.attributes)


def hostile_integers(kind: str, like: Tensor, seed: int) -> Tensor:
    """Integers of any size, near the valid ones, decreasing, or all at one extreme."""
    gen = torch.Generator().manual_seed(seed)
    if kind == "any":
        out = torch.randint(SMALLEST, LARGEST, like.shape, generator=gen).int()
    elif kind == "near":  # negative, not monotone, a little too large
        out = torch.randint(-3, int(like.max()) + 20, like.shape, generator=gen).int()
    elif kind == "falling":
        out = like.flip(0).contiguous()
    else:
        out = torch.full(like.shape, {"smallest": SMALLEST, "largest": LARGEST}[kind], dtype=torch.int32)
    return out.to(like.device)


def random_inputs(
    case: Case,
    lens: list[int],
    context: list[int],
    device: torch.device | str,
    seed: int = 0,
    form: Form = Form.MIXED,
) -> NodeInputs:
    """Ragged sequences over pools with more rows than sequences; of three or more, the second is a padding row."""
    gen = torch.Generator().manual_seed(seed)
    N = len(lens)

    def rand(*shape: int, dtype: str = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=gen).to(getattr(torch, dtype)).to(device)

    def i32(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    slots = [-1 if n == 1 and N > 2 else N + 1 - n for n in range(N)]
    rows = [i32([0, *lens]).cumsum(0).int(), i32(slots), i32(context)]
    if isinstance(case, JetBlockCase):
        H, V = case.num_heads, case.head_v_dim
        shapes = case.shapes(sum(lens), N, N + 2, case.columns + 16)
        tensors = [
            rand(*shapes[0]),  # qkuz
            rand(*shapes[1]),  # ba
            rand(*shapes[2]) * 0.5,  # kappa
            torch.empty(H).uniform_(0.1, 8, generator=gen).log().to(device),  # A_log
            rand(H, dtype="float32") - 3,  # dt_bias
            rand(V) * 0.1 + 1,  # w_o
            rand(*shapes[6]),  # conv_state
            rand(*shapes[7], dtype=case.state_dtype),  # recurrent_state
            *rows,
        ]
        if case.buffer_rows:
            tensors += buffer_tensors(case, slots, context, rand(*shapes[11], dtype="float32"))
    else:
        tensors = attention_tensors(case, lens, context, rand, gen, device) + rows
    return NodeInputs(case, tensors, attributes_of(case, form))


def buffer_tensors(case: JetBlockCase, slots: list[int], context: list[int], noise: Tensor) -> list[Tensor]:
    """step_buffer and state_position, whose sequences hold every number of tokens in turn. `noise`: step_buffer's
    values before they are scaled."""
    K, V = case.head_k_dim, case.head_v_dim
    noise[..., :K] *= K**-0.5
    noise[..., K + V] = -noise[..., K + V].abs() * 0.3  # g
    position = torch.zeros(noise.shape[:2], dtype=torch.int32)
    for n, (slot, length) in enumerate(zip(slots, context, strict=True)):
        position[slot] = max(0, length - (case.buffer_rows + n) % (case.buffer_rows + 1))
    return [noise, position.to(noise.device)]


def attention_tensors(
    case: AttentionCase, lens: list[int], context: list[int], rand: Any, gen: torch.Generator, device: Any
) -> list[Tensor]:
    """qkv, cos_sin, kv_cache, block_table, with pages in random order and three of them unused."""
    Hq, Hkv, Dh, N = case.num_heads, case.num_kv_heads, case.head_dim, len(lens)
    longest = max(n + c for n, c in zip(lens, context, strict=True))
    M = -(-longest // case.page) + 1
    R = case.rotary_dim or Dh
    angle = torch.arange(longest + 1)[:, None] * 1e6 ** (-torch.arange(0, R, 2) / R)
    table = torch.randperm(N * M + 3, generator=gen)[: N * M].view(N, M).int()
    cos_sin = torch.cat((angle.cos(), angle.sin()), 1).to(getattr(torch, case.dtype))
    cache = rand(N * M + 3, 2, Hkv, case.page, Dh, dtype=case.cache_dtype)
    return [rand(sum(lens), (Hq + 2 * Hkv) * Dh), cos_sin.to(device), cache, table.to(device)]
