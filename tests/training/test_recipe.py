"""Recipes: what they say, and one message for each mistake."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jet_export.cli.app import app
from jet_export.training.recipe import PARTS
from jet_export.training.recipe_read import check_recipe, read_recipe
from jet_export.utils.errors import JetExportError

SMALL = """
teacher = "T"
[student]
layers = "ja"
[data]
batch = 12
[[data.source]]
path = "d.txt"
"""


def recipe_of(tmp_path: Path, text: str):
    (tmp_path / "r.toml").write_text(text)
    return check_recipe(read_recipe(tmp_path / "r.toml"), "--recipe r.toml")


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    r = recipe_of(tmp_path, SMALL)
    assert r.data.shards == 6 and r.data.source[0].name == "d.txt"
    assert [s.loss for s in r.stage] == ["features", "logits"]
    assert r.steps_of(r.stage[0]) == -(-100_000_000 // (12 * 4096))


def test_all_trains_every_part(tmp_path: Path) -> None:
    (stage,) = recipe_of(tmp_path, SMALL + '[[stage]]\ntrain = "all"\nsteps = 3').stage
    assert set(stage.train) == set(PARTS) and stage.name == "1-logits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "r.toml: not valid TOML"),
        ("lr = 1", r"r.toml: lr is not known.\nKnown: teacher, seed, student"),
        ("data = 3", "r.toml: data is 3, not a table"),
        ("[data]\nbatch = 0", r"r.toml: data.batch is 0.\nIt takes a whole number of at least 1"),
        ("[data]\nbatch = 1.5", r"data.batch is 1.5.\nIt takes a whole number"),
        ("[data]\nbatch = true", "data.batch is True"),
        ("[data]\nsource = 'x'", r"data.source is 'x', not a list of tables.\nWrite \[\[data.source\]\]"),
        ("[[data.source]]\nformat = 'csv'", r"data.source.format is 'csv'.\nIt takes auto, text, jsonl"),
        ("[[data.source]]\nweight = 0", r"data.source.weight is 0.\nIt takes a number above 0"),
        ("[student]\ninit = 'warm'", r"student.init is 'warm'.\nIt takes random, repeat, svd"),
        ("[student]\nlayers = 3", r"student.layers is 3.\nIt takes a string"),
        (
            "[[stage]]\ntrain = ['head']",
            r"stage.train is 'head'.\nIt takes jet, attention, mlp, norms, embeddings, all",
        ),
        ("[[stage]]\nlr = nan", "stage.lr is nan"),
        ("[[stage]]\nwarmup = 2", r"stage.warmup is 2.\nIt takes a number of at least 0, at most 1"),
        ("[stage]\nlr = 1", "not a list of tables"),
        ("[stage.lr_scale]\nhead = 1", "not a list of tables"),
        ("[run]\ncompile = 'yes'", r"run.compile is 'yes'.\nIt takes true or false"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        recipe_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no teacher"),
        ("teacher = 'T'", "no student.layers"),
        ("teacher = 'T'\n[student]\nlayers = 'ja'", "no data.source"),
        (SMALL.replace("batch = 12", "batch = 12\nshards = 5"), "data.batch 12 is not a multiple of data.shards 5"),
        (SMALL + "hf = 'x/y'", "has both path and hf, or neither"),
        (SMALL + "[[data.source]]\npath = 'd.txt'", "two data.source are named 'd.txt'"),
        (SMALL + "[[stage]]\nloss = 'logits'", "stage 1-logits has both steps and tokens, or neither"),
        (SMALL + "[[stage]]\nsteps = 1\nloss = 'features'\ntrain = 'all'", "features train JetBlocks only"),
        (SMALL + "[[stage]]\nsteps = 1\nkl_weight = 0", "kl_weight and ce_weight are both 0"),
        (SMALL + "[[stage]]\nsteps = 1\nmixture = {e = 1}", r"mixture names 'e'.\nSources: d.txt"),
        (SMALL + "[[stage]]\nsteps = 1\nname = 'a'\n" * 2, "two stages have the same name"),
        (SMALL + "[optimizer]\nbetas = [0.9]", r"optimizer.betas is \[0.9\]"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JetExportError, match=f"--recipe r.toml: .*{message}"):
        recipe_of(tmp_path, text)


def refused(teacher: Path, tmp_path: Path, *options: str) -> str:
    """The message of a command that may not leave anything."""
    output = tmp_path / "out"
    data = ["--data", str(teacher / "config.json")]
    args = ["retrofit", "--teacher", str(teacher), "--output", str(output), "--device", "cpu", *data, *options]
    done = CliRunner().invoke(app, args)
    assert isinstance(done.exception, JetExportError), done.output
    assert not output.exists() or not list(output.rglob("*"))
    return str(done.exception)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("jxa", "student.layers is 'jxa'.\nIt takes a letter a layer"),
        ("ja", "student.layers has 2 letters, the teacher 3 layers"),
        ("jas", "student.window_size is not set"),
        ("jet-2b", "student.layers jet-2b: hidden_size is 1536, the teacher has 32"),
        ("qwen3.5-2b", "student.layers qwen3.5-2b: not for qwen3_5_text models"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(teacher: Path, tmp_path: Path, layers: str, message: str) -> None:
    assert message in refused(teacher, tmp_path, "--student-layers", layers)


def test_a_teacher_that_does_not_fit_is_refused(teacher: Path, tmp_path: Path) -> None:
    assert "model_type is 'jet_nemotron'" in refused(
        teacher, tmp_path, "--teacher", "jet-tiny", "--student-layers", "j"
    )
    other = tmp_path / "t"
    shutil.copytree(teacher, other)
    (other / "tokenizer.json").unlink()
    shutil.rmtree(other / "tokenizer", ignore_errors=True)
    (tmp_path / "r.toml").write_text("[data]\nsequence_length = 64")
    common = "--student-layers", "jaa", "--recipe", str(tmp_path / "r.toml")
    assert "no tokenizer.json" in refused(other, tmp_path, *common)
    shutil.copyfile(teacher / "tokenizer.json", other / "tokenizer.json")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    assert "its largest token is 256, and the teacher's vocabulary has 100" in refused(other, tmp_path, *common)
    assert "data.sequence_length is 4096" in refused(teacher, tmp_path, "--student-layers", "jaa")
