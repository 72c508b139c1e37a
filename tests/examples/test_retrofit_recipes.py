"""examples/retrofit: its recipes are read, and the toy one runs on the toy teacher from the command line."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.retrofits import log_of
from typer.testing import CliRunner

from jet_export.cli.app import app
from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import load_config
from jet_export.training.recipe import SourceRecipe
from jet_export.training.recipe_read import check_recipe, read_recipe
from jet_export.utils.files import DATA

EXAMPLES = ROOT / "examples/retrofit"
LARGE = sorted(p.name for p in EXAMPLES.glob("jet-2b-*.toml"))


@pytest.mark.parametrize(("name", "tokens"), [("jet-2b-50m", 50e6), ("jet-2b-500m", 500e6), ("jet-2b-50b", 50e9)])
def test_a_recipe_has_the_tokens_of_its_name(name: str, tokens: float) -> None:
    recipe = read_recipe(EXAMPLES / f"{name}.toml")
    checked = check_recipe(replace(recipe, data=replace(recipe.data, source=(SourceRecipe(path="x.txt"),))))
    assert sum(s.tokens for s in checked.stage) == tokens
    assert checked.total_steps * checked.tokens_per_step == pytest.approx(tokens, rel=0.01)
    assert load_config(checked.student.layers).num_hidden_layers == 28


def test_there_is_no_other_recipe() -> None:
    assert LARGE == ["jet-2b-500m.toml", "jet-2b-50b.toml", "jet-2b-50m.toml"]


def test_the_toy_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from make_toy_teacher import write_toy_teacher

    teacher = write_toy_teacher(tmp_path / "teacher")
    shutil.copyfile(DATA / "heldout.txt", tmp_path / "text.txt")
    args = ["--recipe", str(EXAMPLES / "toy.toml"), "--teacher", str(teacher), "--data", str(tmp_path / "text.txt")]
    done = CliRunner().invoke(app, ["retrofit", *args, "--output", str(tmp_path / "run"), "--device", "cpu"])
    sys.modules.pop("make_toy_teacher")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == f"Next: jet-export build --model {tmp_path}/run/model"
    log = log_of(tmp_path / "run")
    assert len(log) == 15 and log[4]["loss"] < log[0]["loss"] and log[14]["loss"] < log[10]["loss"]
    config = JetNemotronConfig.from_json_file(tmp_path / "run/model/config.json")
    assert config.layer_types == ("jet", "attn", "jet", "jet")
