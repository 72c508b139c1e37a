"""The supernet's paths are the models that they stand for, and its training reaches their JetBlocks alone."""

import pytest
import torch

from jet_export.postnas.evaluate import Objective, Readout, divergence, score, tells_apart
from jet_export.postnas.recipe import TaskRecipe
from jet_export.postnas.supernet import SupernetObjective, draw_path, path_readout
from jet_export.postnas.tasks import Item, Task
from jet_export.training.data.rows import Batch
from jet_export.training.losses import feature_losses, teacher_features
from jet_export.training.student import set_trainable

LAYERS = 3
TEXT = Task(TaskRecipe(name="text"), [Item(list(range(5, 40)), [(1, 35)]), Item([7, 8, 9], [(1, 3)])])
ANSWERS = Task(TaskRecipe(name="recall", kind="recall"), [Item(list(range(5, 40)), [(4, 6), (30, 31)])])


def test_paths_are_students_of_these_layers(pair, batch: Batch) -> None:
    student, teacher = pair
    with torch.no_grad():
        all_jet, every = (Readout.of(m).hidden(batch) for m in (student, teacher))
        torch.testing.assert_close(path_readout(student, teacher, ()).hidden(batch), all_jet)
        torch.testing.assert_close(path_readout(student, teacher, range(LAYERS)).hidden(batch), every)
        mixed = path_readout(student, teacher, (1,)).hidden(batch)
        h = student.embed(batch)
        context = teacher.context(batch)
        for layer in (student.layers[0], teacher.layers[1], student.layers[2]):
            h = layer(h, context).hidden
        torch.testing.assert_close(mixed, student.norm(h))
        assert not torch.allclose(mixed, all_jet) and not torch.allclose(mixed, every)


def test_one_jet_block_on_the_path_has_the_loss_of_the_feature_stage(pair, batch: Batch) -> None:
    """Before it the path is the teacher's, so its input is too."""
    student, teacher = pair
    objective = SupernetObjective(student, teacher, (2,), 0.0, seed=0, step=0, calls_per_step=1)
    (linear,) = set(range(LAYERS)) - set(draw_path(0, 0, LAYERS, (2,)))
    ours = objective(batch)
    features = teacher(batch, lambda m, b: teacher_features(m, b, [linear]))
    wanted = student(batch, lambda m, b: feature_losses(m, b, features))
    torch.testing.assert_close(ours.total, wanted.total)


def test_gradients_reach_the_jet_blocks_of_the_path_alone(pair, batch: Batch) -> None:
    student, teacher = pair
    set_trainable(student, ("jet",))
    for kl_weight, step in ((0.0, 0), (0.5, 1), (0.5, 2)):
        student.zero_grad()
        objective = SupernetObjective(student, teacher, (0, 1, 2), kl_weight, seed=3, step=step, calls_per_step=1)
        objective(batch).total.backward()
        kept = draw_path(3, step, LAYERS, (0, 1, 2))
        for i, layer in enumerate(student.layers):
            grads = [p.grad is not None and bool(p.grad.any()) for p in layer.self_attn.parameters()]
            assert not any(grads) if i in kept else all(grads)
        assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()


def test_paths_depend_on_seed_and_step_and_are_spread_over_placements(pair, batch: Batch) -> None:
    paths = [draw_path(1, step, 6, (0, 1, 2, 6)) for step in range(400)]
    assert paths == [draw_path(1, step, 6, (0, 1, 2, 6)) for step in range(400)]
    assert {len(p) for p in paths} == {0, 1, 2}
    assert {p for p in paths if len(p) == 1} == {(i,) for i in range(6)}
    assert abs(sum(len(p) == 2 for p in paths) / 400 - 1 / 3) < 0.1
    student, teacher = pair
    objective = SupernetObjective(student, teacher, (0, 1), 0.0, seed=1, step=5, calls_per_step=2)
    with torch.no_grad():
        first, second = (float(objective(batch).total) for _ in range(2))  # two micro-batches of step 5
        alone = SupernetObjective(student, teacher, (0, 1), 0.0, seed=1, step=5, calls_per_step=1)
        assert first == second == float(alone(batch).total)


def test_scores_are_those_of_the_logits(pair) -> None:
    _, teacher = pair
    model = Readout.of(teacher)
    with torch.no_grad():
        nll, hits = [], []
        for item in TEXT.items:
            row = Batch.of([item.row(len(item.tokens))])
            logp = teacher(row, lambda m, b: m.logits(b)).log_softmax(-1)
            nll += [-float(logp[i, t]) for i, t in enumerate(item.tokens[1:])]
        (item,) = ANSWERS.items
        best = teacher(Batch.of([item.row(35)]), lambda m, b: m.logits(b)).argmax(-1).tolist()
    hits = [all(best[i - 1] == item.tokens[i] for i in range(*span)) for span in item.spans]
    scores = score(model, [TEXT, ANSWERS])
    assert abs(scores["text"]["loss"] - sum(nll) / len(nll)) < 1e-5
    assert scores["recall"]["accuracy"] == sum(hits) / 2
    right = Item([*item.tokens[:30], best[29]], [(30, 31), (4, 6)])
    assert score(model, [Task(ANSWERS.recipe, [right])])["recall"]["accuracy"] >= 0.5


def test_divergence_is_zero_of_the_teacher_and_positive_of_others(pair) -> None:
    student, teacher = pair
    ours = [divergence(path_readout(student, teacher, p), Readout.of(teacher), TEXT) for p in ((), (0, 1, 2))]
    assert ours[0] > 1e-6 and abs(ours[1]) < 1e-9


def test_the_combined_objective_is_the_share_of_the_way_to_the_teacher() -> None:
    low = {"text": {"loss": 4.0}, "recall": {"loss": 3.0, "accuracy": 0.1}}
    high = {"text": {"loss": 2.0}, "recall": {"loss": 1.0, "accuracy": 0.9}}
    half = {"text": {"loss": 3.0}, "recall": {"loss": 2.0, "accuracy": 0.3}}
    tasks = (TEXT, ANSWERS)
    combined = Objective(tasks, "combined", low, high)
    assert combined.value(low) == 0 and combined.value(high) == 1
    assert abs(combined.value(half) - (0.5 + 0.25) / 2) < 1e-12
    assert Objective(tasks, "text", low, high)(half) == (-3.0, -3.0)
    better = {**half, "recall": {"loss": 1.5, "accuracy": 0.3}}
    recall = Objective(tasks, "recall", low, high)
    assert recall(better)[0] == recall(half)[0] and recall(better) > recall(half)  # a tie, broken by the loss
    same = {**high, "recall": low["recall"]}  # a task that tells nothing is left out
    assert Objective(tasks, "combined", low, same).value(half) == 0.5


@pytest.mark.parametrize(("answers", "tells"), [(2, False), (200, True)])
def test_a_task_counts_if_its_lead_is_more_than_noise(answers: int, tells: bool) -> None:
    low = {"text": {"loss": 4.0}, "recall": {"loss": 3.0, "accuracy": 0.4}}
    high = {"text": {"loss": 2.0}, "recall": {"loss": 1.0, "accuracy": 0.6}}
    task = Task(ANSWERS.recipe, [Item([1, 2], [(1, 2)])] * answers)
    assert tells_apart(task, low, high) == tells_apart(task, high, low) == tells
    middle = {"text": {"loss": 4.0}, "recall": {"loss": 2.0, "accuracy": 0.6}}
    assert abs(Objective((TEXT, task), "combined", low, high).value(middle) - (0.5 if tells else 0)) < 1e-12
    assert not tells_apart(task, low, low)
