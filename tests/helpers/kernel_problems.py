"""Small ragged problems for every kernel, on any device: what sanitize.py and the tests of the kernels' laws run.

A problem has several sequences of unlike lengths, one of them padding, over pools with more rows than sequences,
where the rows that no sequence owns are NaN. `launch` takes fresh copies of the inputs, updates the states among them
in place and returns the outputs; `reference` is the kernel's specification on the CPU in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.compare import relative_error
from helpers.poison import poisoned
from jet_export.kernels.add_norm import add_norm_ref, add_norm_triton
from jet_export.kernels.attention import attention_ref, attention_triton
from jet_export.kernels.dynamic_conv import dynamic_conv_ref, dynamic_conv_triton
from jet_export.kernels.form import Form
from jet_export.kernels.gated_delta_rule import gated_delta_rule_triton, packed_gated_delta_rule_ref
from jet_export.kernels.gated_rms_norm import gated_rms_norm_ref, gated_rms_norm_triton
from jet_export.kernels.gemv import gemv_ref, gemv_triton
from jet_export.kernels.jet_block import jet_block_ref, jet_block_triton
from jet_export.kernels.skinny_gemm import (
    skinny_linear_ref,
    skinny_linear_triton,
    skinny_partials_ref,
    skinny_partials_triton,
    splits_of,
)
from jet_export.kernels.state_layout import EXTRA, buffer_rows

FP8 = torch.float8_e4m3fn
PAGE = 16
PADDING = 1  # the sequence that is padding
INTERVAL = 2  # tokens from write to write, where states are not written at every token
Inputs = dict[str, Tensor]


@dataclass
class Problem:
    """`tokens`, `slots`, `pages`: the inputs whose rows belong to a sequence's tokens, pool slots and cache pages."""

    name: str
    inputs: Inputs
    launch: Callable[[Inputs], Tensor]
    reference: Callable[[Inputs], Tensor]
    tokens: tuple[str, ...]
    slots: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()

    @property
    def states(self) -> tuple[str, ...]:
        return self.slots + self.pages

    def copies(self) -> Inputs:
        return {n: x.clone() for n, x in self.inputs.items()}

    def run(self) -> tuple[Tensor, Inputs]:
        """(outputs, inputs with the states after) of one launch on copies."""
        inputs = self.copies()
        return self.launch(inputs), inputs

    def rows(self, sequence: int) -> dict[str, Tensor]:
        """input -> the indices of its rows that belong to a sequence."""
        i = self.inputs
        begin, end = i["cu_seqlens"][sequence : sequence + 2].tolist()
        out = {n: torch.arange(begin, end) for n in self.tokens}
        out |= {
            n: i["slots"][sequence : sequence + 1].long().cpu() for n in self.slots if int(i["slots"][sequence]) >= 0
        }
        return out | {n: i["block_table"][sequence].long().cpu() for n in self.pages}

    def disturbed(self, keep: int, seed: int = 1) -> Problem:
        """The same problem with all that belongs to the other sequences replaced by other numbers."""
        rng = torch.Generator().manual_seed(seed)
        changed = self.copies()
        for n in range(len(changed["slots"])):
            for name, rows in self.rows(n).items() if n != keep else ():
                x = changed[name]
                noise = 3 * torch.randn(len(rows), *x.shape[1:], generator=rng)
                raw(x)[rows.to(x.device)] = raw(noise.to(x.dtype)).to(x.device)
        return Problem(self.name, changed, self.launch, self.reference, self.tokens, self.slots, self.pages)


def over_inputs(op: Callable[..., Tensor], *rest: Any, first: int | None = None) -> Callable[[Inputs], Tensor]:
    """op of the inputs in their order, or of the `first` of them, and of `rest`."""
    return lambda inputs: op(*list(inputs.values())[:first], *rest)


def with_buffer(
    op: Callable[..., Tensor], first: int, sizes: tuple[Any, ...], interval: tuple[int, ...]
) -> Callable[[Inputs], Tensor]:
    """op of the `first` inputs, `sizes`, the inputs behind them (a step buffer's pools), and the interval."""
    return lambda inputs: op(*list(inputs.values())[:first], *sizes, *list(inputs.values())[first:], *interval)


def raw(x: Tensor) -> Tensor:
    """Indexing is not implemented for FP8: its bytes."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def i32(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def shape_of(form: Form, large: bool) -> tuple[list[int], list[int]]:
    """Tokens and tokens held of each sequence; the second is padding."""
    if form == Form.MIXED:
        return ([1, 1, 5, 1], [40, 4, 5, 0]) if not large else ([1, 1, 300, 1], [700, 4, 383, 0])
    if form == Form.DECODE:
        return [1, 1, 1, 1], [5, 4, 0, 40 if not large else 700]
    if form == Form.VERIFY:
        return [1, 2, 3, 5], [5, 4, 0, 40 if not large else 700]
    return ([1, 2, 5, 18], [5, 4, 0, 3]) if not large else ([1, 2, 65, 300], [5, 4, 0, 383])


def jet_problems(device: str, dtype: torch.dtype, state: torch.dtype, dims: tuple[int, int, int], large: bool):
    """jet_block in every form, and on the same numbers its parts: convolution, delta rule, gated norm."""
    H, K, V = dims
    D, W = H * V, 4
    held_forms = [(form, form == Form.VERIFY) for form in Form] + [(Form.DECODE, True)]
    for form, buffered in held_forms:
        lens, context = shape_of(form, large)
        rng = torch.Generator().manual_seed(3)
        T, N = sum(lens), len(lens)

        def rand(*shape: int, dtype: torch.dtype = dtype, rng: torch.Generator = rng) -> Tensor:
            return torch.randn(*shape, generator=rng).to(dtype).to(device)

        slots = i32([N + 1, -1, 0, 2], device)
        common = {
            "cu_seqlens": i32([0, *torch.tensor(lens).cumsum(0).tolist()], device),
            "slots": slots,
            "context_lens": i32(context, device),
        }
        block = {
            "qkuz": rand(T, 2 * H * K + 2 * D + 8),
            "ba": rand(T, 2 * H),
            "kappa": 0.5 * rand(T, D * W),
            "A_log": torch.empty(H).uniform_(0.1, 8, generator=rng).log().to(device),
            "dt_bias": rand(H, dtype=torch.float32) - 3,
            "w_o": 1 + 0.1 * rand(V),
            "conv_state": poison_unowned(rand(N + 2, W - 1 + (5 if form == Form.VERIFY else 0), D), slots),
            "recurrent_state": poison_unowned(rand(N + 2, H, K, V, dtype=state), slots),
            **common,
        }
        name = form.name.lower() + (" held" if buffered and form != Form.VERIFY else "")
        # The last inputs where states are written every few tokens: some sequences' buffers are full, others' are not.
        held: Inputs = {}
        if buffered:
            positions = torch.tensor([n % 3 + 3 for n in range(N + 2)], dtype=torch.int32, device=device)
            positions[2] = max(context) - 2
            rows = 8 if form == Form.VERIFY else buffer_rows(INTERVAL, 0)
            buffer = poison_unowned(rand(N + 2, H, rows, K + V + EXTRA, dtype=torch.float32) * 0.1, slots)
            held = {"step_buffer": buffer, "state_position": positions[:, None].repeat(1, H)}
        interval = (INTERVAL,) if held else ()
        yield Problem(
            f"jet_block {name}",
            block | held,
            launch=with_buffer(jet_block_triton, len(block), (H, K, V, 1e-5, form), interval),
            reference=with_buffer(jet_block_ref, len(block), (H, K, V, 1e-5, form), interval),
            tokens=("qkuz", "ba", "kappa"),
            slots=("conv_state", "recurrent_state", *held),
        )
        rule = {
            "q": rand(T, H, K),
            "k": rand(T, H, K),
            "v": rand(T, H, V),
            "beta": rand(T, H).sigmoid(),
            "g": -rand(T, H, dtype=torch.float32).abs(),
            "recurrent_state": block["recurrent_state"],
            **common,
        }
        yield Problem(
            f"gated_delta_rule {name}",
            rule | held,
            with_buffer(gated_delta_rule_triton, len(rule), (form,), interval),
            with_buffer(packed_gated_delta_rule_ref, len(rule), (form,), interval),
            ("q", "k", "v", "beta", "g"),
            ("recurrent_state", *held),
        )
        if form != Form.PREFILL:
            continue
        conv = {"u": rand(T, D), "kappa": block["kappa"], "conv_state": block["conv_state"], **common}
        yield Problem(
            "dynamic_conv",
            conv,
            over_inputs(dynamic_conv_triton),
            over_inputs(dynamic_conv_ref),
            ("u", "kappa"),
            ("conv_state",),
        )
        norm = {"o": rand(T, H, V), "w_o": block["w_o"], "gate": rand(T, H, V), **common}
        yield Problem(
            "gated_rms_norm",
            norm,
            lambda i: gated_rms_norm_triton(i["o"], i["w_o"], i["gate"], 1e-5),
            lambda i: gated_rms_norm_ref(i["o"], i["w_o"], i["gate"], 1e-5),
            ("o", "gate"),
        )


def poison_unowned(pool: Tensor, slots: Tensor) -> Tensor:
    """The pool with NaN in every row that belongs to no sequence."""
    mine = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
    mine[slots[slots >= 0].long()] = True
    pool[~mine] = float("nan")
    return pool


def attention_problems(device: str, dtype: torch.dtype, cache: torch.dtype, heads: tuple[int, int, int], large: bool):
    """attention in every form, full and with a window."""
    Hq, Hkv, Dh = heads
    scale = 0.02 if cache == FP8 else 1.0
    for form in Form:
        for window in (0, 9):
            lens, context = shape_of(form, large)
            rng = torch.Generator().manual_seed(4)
            N, longest = len(lens), max(a + b for a, b in zip(lens, context, strict=True))
            M = -(-longest // PAGE)
            angle = torch.arange(longest)[:, None] * 1e4 ** (-torch.arange(0, Dh, 2) / Dh)
            table = torch.randperm(N * M + 2, generator=rng)[: N * M].view(N, M)
            pages = torch.randn(N * M + 2, 2, Hkv, PAGE, Dh, generator=rng)
            mine = torch.zeros(len(pages), dtype=torch.bool)
            mine[table.flatten()] = True
            pages[~mine] = float("nan")
            inputs = {
                "qkv": torch.randn(sum(lens), (Hq + 2 * Hkv) * Dh, generator=rng).to(dtype).to(device),
                "cos_sin": torch.cat([angle.cos(), angle.sin()], 1).to(dtype).to(device),
                "kv_cache": pages.to(cache).to(device),
                "block_table": table.int().to(device),
                "cu_seqlens": i32([0, *torch.tensor(lens).cumsum(0).tolist()], device),
                "slots": i32([3, -1, 0, 2], device),
                "context_lens": i32(context, device),
            }
            launch = over_inputs(attention_triton, Hq, Hkv, Dh, window, scale, scale, form)
            reference = over_inputs(attention_ref, Hq, Hkv, Dh, window, scale, scale)
            name = f"attention {form.name.lower()}" + (f" window {window}" if window else "")
            yield Problem(name, inputs, launch, reference, ("qkv",), (), ("kv_cache",))


def problems(device: str, large: bool = False) -> dict[str, Problem]:
    """Every kernel's problems by name. large: the heads of jet-2b and jet-4b, in the dtypes that engines use; otherwise
    small heads in fp32, for the interpreter."""
    out: dict[str, Problem] = {}
    if not large:
        fp32 = torch.float32
        groups = {
            "": [
                *jet_problems(device, fp32, fp32, (1, 16, 32), False),
                *attention_problems(device, fp32, fp32, (2, 1, 16), False),
            ]
        }
    else:
        bf16, fp32 = torch.bfloat16, torch.float32
        groups = {}
        for model, dims, heads in (("2b", (12, 96, 256), (12, 2, 128)), ("4b", (16, 128, 256), (16, 2, 128))):
            groups |= {
                f"{model} state {n}": list(jet_problems(device, bf16, s, dims, True))
                for n, s in (("fp32", fp32), ("bf16", bf16))
            }
            groups |= {
                f"{model} cache {n}": list(attention_problems(device, bf16, c, heads, True))
                for n, c in (("bf16", bf16), ("fp8", FP8))
            }
        groups["few heads"] = list(jet_problems(device, bf16, fp32, (4, 128, 256), True))  # the scan's other form
    for group, members in groups.items():
        out |= {f"{group} {p.name}".strip(): p for p in members}
    return out


def one_token_problems(device: str, large: bool = False) -> dict[str, Problem]:
    """Kernels of a single token: jet::gemv in its dtypes and, if large, jet-2b's sizes."""
    out = {}
    sizes = [(8832, 1536), (12288, 384), (1536, 8960), (24, 1536)] if large else [(24, 96), (7, 40)]  # N, K
    for dtype in (torch.bfloat16, FP8) if large else (torch.float32,):
        for N, K in sizes:
            rng = torch.Generator().manual_seed(N)
            x, weight = (torch.randn(*shape, generator=rng).to(dtype).to(device) for shape in ((1, K), (N, K)))
            scales = {n: torch.tensor([0.5], device=device) for n in ("x_scale", "w_scale")}
            inputs = {
                "x": x,
                "weight": weight,
                **scales,
                "bias": torch.randn(N, generator=rng).to(device),
                "cu_seqlens": i32([0, 1], device),
                "slots": i32([0], device),
            }
            y = torch.float32 if dtype == torch.float32 else torch.bfloat16
            around = (None, None, None, 0.0, False, False)
            name = f"gemv {N} x {K} {str(dtype).removeprefix('torch.')}"
            out[name] = Problem(
                name,
                inputs,
                over_inputs(gemv_triton, *around, y, first=5),
                over_inputs(gemv_ref, *around, torch.float32, first=5),
                ("x",),
            )
    return out


def few_token_problems(device: str, large: bool = False) -> dict[str, Problem]:
    """Kernels of a few tokens, which belong to no sequence: jet::skinny_linear and skinny_partials, and jet::add_norm.
    Codes of the next layer are made, and tests of their own compare them: the smallest error is a whole step there."""
    out: dict[str, Problem] = {}
    N, K, M = (8960, 1536, 9) if large else (48, 96, 5)
    for dtype in (torch.bfloat16, FP8) if large else (torch.float32,):
        rng = torch.Generator().manual_seed(6)

        def rand(*shape: int, rng: torch.Generator = rng) -> Tensor:
            return torch.randn(*shape, generator=rng).to(device)

        y = torch.float32 if dtype == torch.float32 else torch.bfloat16
        scale = torch.tensor([0.5], device=device)
        rows = {"cu_seqlens": i32([0, M], device), "slots": i32([0], device)}
        linear = {"x": rand(M, K).to(dtype), "weight": rand(2 * N, K).to(dtype), "x_scale": scale, "w_scale": scale}
        product = {n: linear[n] for n in ("x", "weight")}
        splits = splits_of(linear["weight"])
        joined = {
            "partials": rand(3, M, K),
            **{n: scale for n in ("x_scale", "w_scale")},
            "bias": rand(K).to(y),
            "residual": rand(M, K).to(y),
            "norm_weight": rand(K).to(y),
            "y_scale": scale,
            "z_weight": rand(24, K).to(y),
        }
        made = [
            Problem(
                f"skinny_linear{' gated' if gated else ''}",
                linear | rows,
                over_inputs(skinny_linear_triton, None, None, gated, y, first=4),
                over_inputs(skinny_linear_ref, None, None, gated, torch.float32, first=4),
                ("x",),
            )
            for gated in (False, True)
        ]
        made += [
            Problem(
                "skinny_partials",
                product | rows,
                over_inputs(summed(skinny_partials_triton), splits, first=2),
                over_inputs(summed(skinny_partials_ref), splits, first=2),
                ("x",),
            ),
            Problem(
                "add_norm",
                joined | rows,
                over_inputs(without_codes(add_norm_triton), 1e-5, True, first=8),
                over_inputs(without_codes(add_norm_ref), 1e-5, True, first=8),
                ("residual",),
            ),
        ]
        kind = str(dtype).removeprefix("torch.")
        out |= {f"{p.name} {kind}": p for p in made}
    return out


def summed(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sum of the parts that op gives."""
    return lambda *args: op(*args).sum(0)


def without_codes(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """add_norm's other outputs side by side."""

    def outputs(*args: Any) -> Tensor:
        h, a, _, z = op(*args)
        return torch.cat([h, a, z], 1)

    return outputs


def every_problem(device: str, large: bool = False) -> dict[str, Problem]:
    """Of all kernels, by name."""
    return problems(device, large) | one_token_problems(device, large) | few_token_problems(device, large)


def error_of(problem: Problem) -> float:
    """Relative error of a launch with NaN in every output beforehand; NaN where an element was not written."""
    with poisoned():
        got, _ = problem.run()
    inputs = {
        n: x.float().cpu() if x.is_floating_point() and x.dtype != FP8 else x.cpu() for n, x in problem.copies().items()
    }
    live = live_tokens(problem.inputs)
    want = problem.reference(inputs).float().flatten(1)[live]
    return relative_error(got.float().cpu().flatten(1)[live], want)


def live_tokens(inputs: Inputs) -> Tensor:
    """[T] bool: tokens of sequences that are not padding."""
    lens = inputs["cu_seqlens"].cpu().diff()
    return (inputs["slots"].cpu() >= 0).repeat_interleave(lens)
