"""Whole runs: stopped, killed and resumed; in two processes; and what ends them."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.retrofits import log_of
from safetensors.torch import load_file

from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.training.checkpoint import saved_steps
from jet_export.training.distributed import processes
from jet_export.training.recipe import Recipe, SourceRecipe
from jet_export.training.run import run_retrofit
from jet_export.utils.errors import JetExportError

STEPS = 9


def run(recipe: Recipe, output: Path, resume: bool = False, emit: Callable[[str], None] = lambda line: None) -> bool:
    return run_retrofit(recipe, output, device="cpu", resume=resume, emit=emit)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert run(recipe, output)
    return output


def same_run(ours: Path, theirs: Path) -> None:
    assert log_of(ours) == log_of(theirs)
    assert (ours / "model/model.safetensors").read_bytes() == (theirs / "model/model.safetensors").read_bytes()


def test_a_run_leaves_a_model_a_log_and_the_last_checkpoints(whole: Path, recipe: Recipe) -> None:
    log = log_of(whole)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert [line["stage"] for line in log] == ["features"] * 3 + ["logits"] * 4 + ["all"] * 2
    assert log[2]["loss"] < log[0]["loss"] and log[-1]["tokens"] == STEPS * 256
    assert saved_steps(whole / "checkpoints") == [8, 9]
    model = JetNemotronForCausalLM.from_pretrained(whole / "model", torch.float32)
    assert model.config.layer_types == ("jet", "attn", "swa")
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
    assert (whole / "model/tokenizer.json").is_file()


def test_frozen_weights_stay_the_teachers_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    assert run(replace(recipe, stage=recipe.stage[:2]), tmp_path / "run")
    ours, theirs = (
        load_file(tmp_path / "run/model/model.safetensors"),
        load_file(Path(recipe.teacher) / "model.safetensors"),
    )
    kept = [n for n in ours if not n.startswith("model.layers.0.self_attn.")]
    assert len(kept) > 20 and all(torch.equal(ours[n], theirs[n]) for n in kept)


@pytest.mark.parametrize("step", [2, 7])
def test_sigterm_ends_a_step_and_the_rest_is_the_same(recipe: Recipe, whole: Path, tmp_path: Path, step: int) -> None:
    """At a checkpoint in a stage, and at a stage's end between two."""
    seen = []

    def emit(line: str) -> None:
        seen.append(line)
        if sum("loss" in s for s in seen) == step and "loss" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not run(recipe, tmp_path / "run", emit=emit)
    assert saved_steps(tmp_path / "run/checkpoints")[-1] == step
    assert f"stopped after step {step}" in seen[-1] and not (tmp_path / "run/model").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(recipe, tmp_path / "run", resume=True)
    same_run(tmp_path / "run", whole)


KILLED = """
import os, pickle, signal, sys, torch
from pathlib import Path
from jet_export.training.run import run_retrofit
torch.set_num_threads(1)
lines = []
def emit(line):
    lines.append(line)
    if sum("loss" in s for s in lines) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
run_retrofit(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), device="cpu", resume=False, emit=emit)
"""


def test_a_killed_run_goes_on_and_the_rest_is_the_same(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    import pickle

    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe"), str(tmp_path / "run")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert max(saved_steps(tmp_path / "run/checkpoints")) < 6  # some steps have to be done again
    assert run(recipe, tmp_path / "run", resume=True)
    same_run(tmp_path / "run", whole)


PROCESSES = """
import os, pickle, sys, torch
from pathlib import Path
from jet_export.training.run import run_retrofit
from jet_export.utils.errors import JetExportError
torch.set_num_threads(1)
broken, whole = pickle.loads(Path(sys.argv[1]).read_bytes())
try:
    run_retrofit(broken, Path(sys.argv[2] + "-broken"), device="cpu", resume=False, emit=lambda line: None)
except JetExportError as e:
    print(f"process {os.environ['RANK']}: {e}")
run_retrofit(whole, Path(sys.argv[2]), device="cpu", resume=False, emit=print)
"""


def test_two_processes_have_the_losses_of_one(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """Sharded over both (FSDP); one goes on with the checkpoint of two; data that one cannot read ends both."""
    import pickle

    short = replace(recipe, stage=recipe.stage[:2])
    (tmp_path / "odd.jsonl").write_text('{"text": "ten words or so for every row of it"}\n' * 31 + "broken\n")
    source = SourceRecipe(name="odd", path=str(tmp_path / "odd.jsonl"))
    broken = replace(short, data=replace(short.data, source=(source,)))
    (tmp_path / "recipe").write_bytes(pickle.dumps((broken, short)))
    (tmp_path / "script.py").write_text(PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "script.py"), str(tmp_path / "recipe"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    for process in (0, 1):
        assert f"process {process}: data source odd: {source.path}, byte 1488: a line that is not JSON" in done.stdout
    ours = log_of(tmp_path / "run")
    assert len(ours) == 7
    for a, b in zip(ours, log_of(whole), strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
        assert a["parts"] == pytest.approx(b["parts"], rel=1e-4)
    model = load_file(tmp_path / "run/model/model.safetensors")
    assert run(short, tmp_path / "run", resume=True)
    again = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(model[name], again[name]) for name in model)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    from jet_export.training import objective, trainer

    real, calls = objective.backward, []

    def diverging(*args):
        calls.append(1)
        sums = real(*args)
        return replace(sums, values=sums.values * float("nan")) if len(calls) == 3 else sums

    monkeypatch.setattr(trainer, "backward", diverging)
    with pytest.raises(
        JetExportError, match=r"stage features, step 3: the loss is nan. The checkpoint of step 2 is kept"
    ):
        run(recipe, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [2] and len(log_of(tmp_path)) == 2


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_keeps_the_last_checkpoint(recipe: Recipe, tmp_path: Path, monkeypatch, asynchronous: bool) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    real, calls = FileSystemWriter.write_data, []

    def full(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    settings = replace(recipe.checkpoint, asynchronous=asynchronous)
    with pytest.raises(
        JetExportError, match=r"step-00000003 cannot be written \(the disk is full\). The checkpoint of step 2"
    ):
        run(replace(recipe, checkpoint=settings), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_what_torch_says_of_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError with no word of it: seen on a full tmpfs."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from jet_export.training import checkpoint

    def full(self: object, *args: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with processes("cpu") as group:
        checkpoints = checkpoint.Checkpoints(tmp_path, group, keep=2, asynchronous=True)
        tensors = {"a": torch.zeros(1000)}
        with pytest.raises(JetExportError, match=r"cannot be written \(RuntimeError: .*unexpected pos 704 vs 598\)"):
            checkpoints.save(tensors, checkpoint.Progress(step=1), wait=True)
        usage = shutil.disk_usage(tmp_path)._replace(free=3999)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        checkpoints.save(tensors, checkpoint.Progress(step=1))
        with pytest.raises(JetExportError, match=r"\(the disk is full\). There is no checkpoint yet"):
            checkpoints.finish()
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(recipe: Recipe, tmp_path: Path) -> None:
    assert run(replace(recipe, stage=recipe.stage[:1]), tmp_path / "run")
    (file,) = (tmp_path / "run/checkpoints/step-00000003").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(JetExportError, match=r"step-00000003: cannot be read"):
        run(replace(recipe, stage=recipe.stage[:1]), tmp_path / "run", resume=True)


def test_another_recipe_does_not_resume(recipe: Recipe, whole: Path) -> None:
    with pytest.raises(JetExportError, match=r"a run is there already.\nGo on with it by --resume"):
        run(recipe, whole)
    other = replace(recipe, data=replace(recipe.data, batch=8))
    with pytest.raises(JetExportError, match=r"--resume: data.batch was 4 and is 8 now"):
        run(other, whole, resume=True)
    first = replace(recipe.stage[0], lr=1.0)
    with pytest.raises(JetExportError, match=r"--resume: stage\[0\].lr was 0.002 and is 1.0 now"):
        run(replace(recipe, stage=(first, *recipe.stage[1:])), whole, resume=True)
