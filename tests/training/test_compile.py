"""run.compile: layers are traced whole, not for each batch, and have the gradients of those that are not."""

from collections.abc import Iterator

import pytest
import torch
from helpers.compare import relative_error
from helpers.retrofits import ALONE, VOCAB, models, rows_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from jet_export.training import packed_attention
from jet_export.training.objective import FeatureObjective, LogitsObjective, backward
from jet_export.training.recipe import Recipe, StageRecipe
from jet_export.training.student import set_trainable

BATCHES = [[[40, 24], [64]], [[64], [64]], [[10, 20, 34], [3, 61]], [[1, 2, 3, 58], [30, 34]]]


def train(recipe: Recipe, loss: str, dtype: torch.dtype, compiled: bool) -> tuple[list[dict[str, Tensor]], list[int]]:
    """After each batch: its gradients, and how many graphs there are."""
    student, teacher = models(recipe, dtype)
    set_trainable(student, ("jet",))
    if compiled:
        for model in (student, teacher):
            model.compile_layers(backend="aot_eager")
    stage = StageRecipe(ce_weight=0.5)
    objective = FeatureObjective(student, teacher) if loss == "features" else LogitsObjective(student, teacher, stage)
    gradients, graphs = [], []
    for lengths in BATCHES:
        student.zero_grad()
        backward(objective, rows_of(lengths, VOCAB), 2, ALONE)
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        graphs.append(counters["stats"]["unique_graphs"])
    return gradients, graphs


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("loss", ["features", "logits"])
@pytest.mark.parametrize("flex", [False, True])
def test_compiled_layers_have_the_gradients_of_plain_ones(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, flex: bool, loss: str
) -> None:
    """With the CPU's attention in bf16 autocast; and in fp32 with flex_attention in the layers' graphs, as on a GPU."""
    dtype = torch.float32 if flex else torch.bfloat16
    plain, _ = train(recipe, loss, dtype, compiled=False)
    if flex:
        monkeypatch.setattr(packed_attention, "_masked", packed_attention._flex)
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # refuses backward on a CPU
    compiled, graphs = train(recipe, loss, dtype, compiled=True)
    assert not counters["graph_break"]
    assert graphs[0] > 0 and graphs[0] == graphs[-1], "layers are traced again for other numbers of sequences"
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 5
        for name, grad in ours.items():
            assert relative_error(grad, theirs[name]) < 1e-5, name
