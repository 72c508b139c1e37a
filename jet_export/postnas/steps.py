"""The steps by name, and the last of them: the retrofit of the model that the others chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jet_export.postnas.candidate import MixerRetrofit
from jet_export.postnas.comparison import run_block, run_design
from jet_export.postnas.evaluate import Readout, score
from jet_export.postnas.placement import run_placement
from jet_export.postnas.session import Session, Stopped, logged, trained
from jet_export.postnas.shapes import run_shapes
from jet_export.training.checkpoint import Checkpoints
from jet_export.training.run import CHECKPOINTS, MODEL, run_retrofit
from jet_export.utils.files import replace_directory


def run_last(session: Session) -> dict[str, Any]:
    """The recipe's stages on the chosen layers and sizes; the model goes to OUTPUT/model. Raises Stopped."""
    layers = session.result("placement")["student_layers"]
    size = session.result("shapes")["chosen"]
    K, V, H = map(int, size.split("x"))
    recipe = session.recipe.student(layers, session.recipe.training.stage)
    recipe = replace(recipe, student=replace(recipe.student, num_heads=H, head_k_dim=K, head_v_dim=V))
    output = session.directory

    def say(line: str) -> None:
        if str(output) not in line:  # its name changes
            session.say(line)

    if not run_retrofit(recipe, output, device=session.device, resume=True, emit=say):
        raise Stopped
    retrofit = MixerRetrofit(recipe, output, session.device)
    checkpoints = Checkpoints(output / CHECKPOINTS, session.group, recipe.checkpoint.keep, False)
    progress = checkpoints.last()
    assert progress is not None
    student = trained(session, retrofit, output, progress)
    scores = score(Readout.of(student), session.tasks)
    losses = {line["stage"]: line["loss"] for line in logged(output)}
    session.group.barrier()
    if session.group.first and (output / MODEL).exists():
        replace_directory(output / MODEL, session.output / MODEL)
    return {
        "student_layers": layers,
        "size": size,
        "steps": progress.step,
        "tokens": progress.tokens,
        "training_loss": losses,
        "scores": scores,
        "teacher": session.teacher_scores,
    }


RUN: dict[str, Callable[[Session], dict[str, Any]]] = {
    "placement": run_placement,
    "block": run_block,
    "design": run_design,
    "shapes": run_shapes,
    "retrofit": run_last,
}
