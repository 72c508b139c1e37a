"""Compares an ONNX graph with the model value by value, each computed from the model's own (teacher forcing)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.backends.graph import feeds
from jet_export.backends.onnx.engine import OnnxEngine
from jet_export.backends.onnx.evaluate import OnnxModel
from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch
from jet_export.model.fp8 import Fp8Linear
from jet_export.verify.parity import StageResult, unit_roundoff
from jet_export.verify.trial import SPARE, Layout, decode_step, prefill_step, random_prompts, verify_calls

FORCED = "every node, forced"


class ValueMatch(NamedTuple):
    """How far one value of the graph is from the model's own."""

    name: str
    relative: float  # norm of the difference over the norm of the model's value
    max_abs: float


class ForcedStep(NamedTuple):
    """What one step is run on."""

    input_ids: Tensor
    batch: PackedBatch
    logit_indices: Tensor
    states: list[Tensor]
    decode: bool
    form: Form = Form.MIXED


HELD = [7, 0, 9]  # tokens that the sequences of a forced step hold


def forced_steps(eager: EagerEngine, seed: int) -> Iterator[ForcedStep]:
    """A ragged prefill and a decode step, with padding rows, on states of noise."""
    layout = Layout(eager.config, tokens=2 * SPARE, longest_call=SPARE, seed=seed, device=eager.device)
    prompts = random_prompts(eager.config, SPARE, seed)
    for call in (prefill_step(eager.limits), decode_step()):
        ids = torch.tensor([t for row, n in zip(call.rows, call.lens, strict=True) for t in prompts[row][:n]])
        rows = torch.arange(len(ids), dtype=torch.int32, device=eager.device)
        states = [layout.noise(spec) for spec in eager.specs]
        yield ForcedStep(ids.to(eager.device), layout.batch(call, HELD), rows, states, call.decode)
    if eager.rollback:
        call = verify_calls(eager.rollback)[0]
        ids = torch.tensor([t for row, n in zip(call.rows, call.lens, strict=True) for t in prompts[row][:n]])
        rows = torch.arange(len(ids), dtype=torch.int32, device=eager.device)
        states = [layout.noise(spec) for spec in eager.specs]
        yield ForcedStep(ids.to(eager.device), layout.batch(call, HELD), rows, states, False, Form.VERIFY)


def forced_bound(eager: EagerEngine, name: str) -> float:
    """The largest relative error of a value. fp32: sums are in another order. bf16: results are one rounding apart, u,
    and so are both operands of FP8 products."""
    if eager.dtype == torch.float32:
        return 1e-5
    module = dict(eager.model.named_modules()).get(name)
    return (3 if isinstance(module, Fp8Linear) else 1) * unit_roundoff(eager.dtype)


def forced_stage(engine: OnnxEngine, eager: EagerEngine, seed: int) -> StageResult:
    """`teacher_forced` as a stage of verify."""
    tokens, failures = 0, []
    for step in forced_steps(eager, seed):
        tokens += len(step.input_ids)
        mode = "verify" if step.form is Form.VERIFY else "decode" if step.decode else "prefill"
        graph = engine.verify_graph if step.form is Form.VERIFY else engine.graph
        assert graph is not None
        for m in teacher_forced(graph, eager, step):
            bound = forced_bound(eager, m.name)
            if not m.relative <= bound:
                failures.append(f"{FORCED}: {mode}: {m.name}: relative error {m.relative:.3g}, bound {bound:.3g}")
    return StageResult(FORCED, tokens, [], failures)


@torch.inference_mode()
def teacher_forced(graph: OnnxModel, eager: EagerEngine, step: ForcedStep) -> list[ValueMatch]:
    """Evaluate the graph, and replace each value that the model has too by the model's own once it is compared.

    So an error does not reach later comparisons: only a few nodes lie between two of them. The step's states are not
    changed.
    """
    names = [s.name for s in eager.specs]
    expected = model_values(graph, eager, step)
    out: list[ValueMatch] = []

    def observe(name: str, value: Tensor) -> Tensor:
        if name not in expected:
            return value
        want = expected[name]
        a, b = value.double(), want.double()
        error = (a - b).norm() / b.norm().clamp(min=1e-30)
        out.append(ValueMatch(name, error.item(), (a - b).abs().max().item()))
        return want

    graph.run(feeds(names, *step[:4]), observe)
    return out


def model_values(graph: OnnxModel, eager: EagerEngine, step: ForcedStep) -> dict[str, Tensor]:
    """The model's own values under the graph's names: outputs of modules, `<path>.input`, logits, states after."""
    made = {name for node in graph.nodes for name in node.outputs}
    values: dict[str, Tensor] = {}
    hooks = []
    for path, module in eager.model.named_modules():
        if path in made:
            hooks.append(module.register_forward_hook(lambda m, x, y, path=path: values.update({path: y})))
        if f"{path}.input" in made:
            hooks.append(module.register_forward_pre_hook(lambda m, x, p=path: values.update({f"{p}.input": x[0]})))
    after = [s.clone() for s in step.states]
    try:
        interval = eager.state_interval
        out = eager.model.forward_packed(
            step.input_ids, step.batch, after, step.logit_indices, step.form, interval=interval
        )
    finally:
        for hook in hooks:
            hook.remove()
    values["logits"] = out.logits
    values.update({f"{s.name}_out": state for s, state in zip(eager.specs, after, strict=True)})
    return values
