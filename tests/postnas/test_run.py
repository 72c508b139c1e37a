"""Whole runs on the toy: what they leave; stopped again and again, killed, and in two processes: the same results."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from jet_export.cli.app import app
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.postnas import shapes
from jet_export.postnas.candidate import SPEED
from jet_export.postnas.placement import EVALUATIONS, Evaluations
from jet_export.postnas.recipe import STEPS, PostnasRecipe
from jet_export.postnas.run import results_of, run_postnas
from jet_export.utils.errors import JetExportError

Emit = Callable[[str], None]


def run(recipe: PostnasRecipe, output: Path, emit: Emit = lambda line: None, **options: Any) -> bool:
    return run_postnas(recipe, output, device="cpu", emit=emit, **options)


def without_speed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_speed(v) for k, v in value.items() if k != SPEED}
    return [without_speed(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(recipe: PostnasRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert run(recipe, output)
    return output


def same_run(ours: Path, theirs: Path) -> None:
    assert without_speed(results_of(ours)) == without_speed(results_of(theirs))
    assert (ours / "model/model.safetensors").read_bytes() == (theirs / "model/model.safetensors").read_bytes()


def test_a_run_leaves_its_steps_a_report_and_a_model(whole: Path, recipe: PostnasRecipe) -> None:
    left = {"teacher", "model", "recipe.json", "report.html", *STEPS}
    assert {p.name for p in whole.iterdir()} == left
    r = results_of(whole)
    placement = r["placement"]
    assert placement["student_layers"].count("a") == recipe.placement.choose
    methods = {row["method"] for row in placement["placements"]}
    assert methods == {
        "learned: combined",
        "learned: text",
        "learned: recall",
        "learned: code",
        "uniform",
        "restore-one KL",
    }
    assert all(len(row["attention"]) == row["keep"] for row in placement["placements"])
    assert set(placement["importance"]) == {"text", "recall", "code"} and placement["evaluated"] == 4
    assert [row["name"] for row in r["block"]["rows"]] == ["jet", "gdn"]
    assert [row["name"] for row in r["design"]["rows"]] == ["static v"]
    for step in ("block", "design"):
        rows = r[step]["rows"]
        assert len({row["state_bytes"] for row in rows}) == len({row["tokens"] for row in rows}) == 1
    first, second = r["shapes"]["rungs"]
    assert (len(first), len(second)) == (2, 1) and r["shapes"]["chosen"] == second[0]["name"] == first[0]["name"]
    assert second[0]["tokens"] > first[0]["tokens"] and first[0]["value"] >= first[1]["value"]
    assert not list(whole.glob("*/*/checkpoints")) or [p.parent.name for p in whole.glob("*/*/checkpoints")] == [
        "supernet"
    ]
    model = JetNemotronForCausalLM.from_pretrained(whole / "model", torch.float32)
    kinds = {"a": "attn", "j": "jet"}
    assert model.config.layer_types == tuple(kinds[letter] for letter in placement["student_layers"])
    K, V, H = map(int, r["shapes"]["chosen"].split("x"))
    assert (model.config.head_k_dim, model.config.head_v_dim, model.config.jet_num_heads) == (K, V, H)
    assert (whole / "model/tokenizer.json").is_file()


def test_the_report_is_one_page_with_every_step(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    for words in ("Placement", "Importance of layers", "Blocks", "Design", "Shapes", "Retrofit", "Environment"):
        assert f">{words}</h" in page
    assert page.count('class="plotly-graph-div"') == 6 and "Not run yet" not in page
    assert "<script src" not in page and "http-equiv" in page


def test_a_whole_step_is_not_run_again(whole: Path, recipe: PostnasRecipe) -> None:
    said: list[str] = []
    assert run(recipe, whole, said.append, resume=True)
    assert said == [f"{step}: is there" for step in STEPS]


KILLED = """
import os, pickle, signal, sys, torch
from pathlib import Path
from jet_export.postnas.run import run_postnas
torch.set_num_threads(1)
seen = []
def emit(line):
    seen.append(line)
    if sum("loss" in s for s in seen) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
recipe = pickle.loads(Path(sys.argv[1]).read_bytes())
run_postnas(recipe, Path(sys.argv[2]), steps=sys.argv[4:], device="cpu", resume=True, emit=emit)
"""


def test_killed_then_stopped_again_and_again_it_ends_the_same(
    whole: Path, recipe: PostnasRecipe, tmp_path: Path
) -> None:
    """SIGKILL within the second candidate of the blocks; then SIGTERM after every few steps of training."""
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    shutil.copytree(whole / "teacher", tmp_path / "run/teacher")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe"), str(tmp_path / "run"), "9", *STEPS]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "run/.block/jet-0/result.json").exists() and not (tmp_path / "run/block").exists()
    said: list[str] = []

    def emit(line: str) -> None:
        said.append(line)
        if "loss" in line and sum("loss" in s for s in said) % 4 == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    ended, runs = False, 0
    while not ended:
        ended, runs = run(recipe, tmp_path / "run", emit, resume=True), runs + 1
        assert runs < 40
    assert said[:3] == ["placement: is there", "block: goes on", "candidate gdn"] and runs > 3
    same_run(tmp_path / "run", whole)


def test_scores_of_placements_are_kept(whole: Path, recipe: PostnasRecipe, tmp_path: Path, monkeypatch) -> None:
    """Cut off within a line, and with a placement missing: what is there is not scored again."""
    shutil.copytree(whole / "teacher", tmp_path / "run/teacher")
    shutil.copytree(whole / "placement", tmp_path / "run/.placement")
    (tmp_path / "run/.placement/result.json").unlink()
    path = tmp_path / "run/.placement" / EVALUATIONS
    text = path.read_text()
    path.write_text(text[: len(text) - 20])
    scored, real = [], Evaluations._score

    def noted(self, placement):
        scored.append(placement)
        return real(self, placement)

    monkeypatch.setattr(Evaluations, "_score", noted)
    assert run(recipe, tmp_path / "run", steps=("placement",), resume=True)
    assert len(scored) == 1 and (tmp_path / "run/placement" / EVALUATIONS).read_text() == text
    assert results_of(tmp_path / "run")["placement"] == results_of(whole)["placement"]


def test_what_is_refused(whole: Path, recipe: PostnasRecipe, tmp_path: Path) -> None:
    with pytest.raises(JetExportError, match=r"placement is there already.\nGo on by --resume"):
        run(recipe, whole)
    changed = replace(recipe, block=replace(recipe.block, lr=2e-3))
    with pytest.raises(JetExportError, match=r"block.lr was 0.001 and is 0.002 now.\nOnly \[run\] and \[checkpoint\]"):
        run(changed, whole, resume=True)
    longer = replace(recipe.training, run=replace(recipe.training.run, log_every=7))
    assert run(replace(recipe, training=longer), whole, resume=True)
    with pytest.raises(JetExportError, match=r"placement is not there.\nRun it first: --step placement"):
        run(recipe, tmp_path / "a", steps=("block",))
    much = replace(recipe, placement=replace(recipe.placement, keep=(0, 3), choose=3))
    with pytest.raises(JetExportError, match=r"placement.keep \[0, 3\], choose 3: the teacher has 3 layers"):
        run(much, tmp_path / "b")
    odd = replace(recipe, shapes=replace(recipe.shapes, sizes=("16x32x2", "32x32x2")))
    shutil.copytree(whole, tmp_path / "c", ignore=lambda d, names: {"shapes", "retrofit", "recipe.json"} & {*names})
    with pytest.raises(JetExportError, match=r"states differ: 16x32x2 has 1,024 elements, 32x32x2 has 2,048"):
        run(odd, tmp_path / "c", steps=("shapes",))


def test_two_processes_have_the_results_of_one(whole: Path, recipe: PostnasRecipe, tmp_path: Path) -> None:
    """Supernet and blocks sharded over both (FSDP), scores shared out."""
    (tmp_path / "recipe").write_bytes(pickle.dumps(replace(recipe, block=replace(recipe.block, blocks=("gdn",)))))
    (tmp_path / "script.py").write_text(KILLED)
    shutil.copytree(whole / "teacher", tmp_path / "run/teacher")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "recipe"), str(tmp_path / "run"), "-1"]
    command = [*launch, *arguments, "placement", "block"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    ours, theirs = results_of(tmp_path / "run"), results_of(whole)
    assert ours["placement"]["student_layers"] == theirs["placement"]["student_layers"]
    (a,), (_, b) = ours["block"]["rows"], theirs["block"]["rows"]
    assert a["name"] == b["name"] == "gdn"
    assert a["training_loss"] == pytest.approx(b["training_loss"], rel=1e-4)
    assert a["scores"]["text"]["loss"] == pytest.approx(b["scores"]["text"]["loss"], rel=1e-4)


def test_the_model_decodes_as_it_prefills(whole: Path) -> None:
    """Token by token with states, as an engine does, on the weights that training left."""
    model = JetNemotronForCausalLM.from_pretrained(whole / "model", torch.float32)
    tokens = torch.randint(1, 4096, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(tokens)
        cache = model.new_cache(1, 40)
        pieces = [model(tokens[:, :30], cache), *(model(tokens[:, i : i + 1], cache) for i in range(30, 40))]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=1e-3, atol=1e-4)


def test_the_model_is_built_verified_and_generates(whole: Path, tmp_path: Path, monkeypatch) -> None:
    """By the commands that users run next, as a graph, which compiles nothing, with the smallest limits."""
    monkeypatch.setattr("jet_export.verify.quality.recall", lambda *_: {})  # most of its time; tests/verify has it
    bundle, text = str(tmp_path / "bundle"), tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 10, encoding="utf-8")
    options = ("--backend", "onnx", "--device", "cpu", "--max-batch-size", "1", "--max-seq-len", "32")
    build = ("build", "--model", str(whole / "model"), *options, "--output", bundle)
    generate = ("generate", bundle, "--prompt", "def ", "--max-new-tokens", "4")
    for command, said in (
        (build, bundle),
        (("verify", bundle, "--text", str(text)), "PASSED"),
        (generate, "[4 tokens"),
    ):
        done = CliRunner().invoke(app, [*command])
        assert done.exit_code == 0 and said in done.output, (done.output, done.exception)


SPACE = """
[jet]
sizes = ["16x64x2", "16x128x1"]
[measure]
batch = [2]
context = [128]
prefill_chunk = 64
[constraints]
cache_bytes = "none"
[target]
slack_percent = {slack}
"""


@pytest.mark.parametrize(("slack", "by"), [(1000, "score"), (0, "speed")])
def test_sizes_are_chosen_by_score_and_the_latency_of_engines(
    whole: Path, recipe: PostnasRecipe, tmp_path: Path, monkeypatch, slack: int, by: str
) -> None:
    """Among the sizes left by the halving, as `jet-export search` chooses; no engine is built here."""
    from helpers.fake_executor import searched

    monkeypatch.setattr(shapes, "run_search", lambda search, emit: searched(search))
    sizes, first = ("16x64x2", "16x128x1"), results_of(whole)["shapes"]["rungs"][0]
    rows = {name: {**row, "name": name} for name, row in zip(sizes, first, strict=True)}
    monkeypatch.setattr(shapes, "_rung", lambda session, left, *_: [rows[c.name] for c in left])
    (tmp_path / "space.toml").write_text(SPACE.format(slack=slack))
    space = replace(recipe.shapes, sizes=(), space=str(tmp_path / "space.toml"), rungs=1)
    for name in ("teacher", "placement"):
        shutil.copytree(whole / name, tmp_path / "run" / name)
    assert run(replace(recipe, shapes=space), tmp_path / "run", steps=("shapes",))
    result = results_of(tmp_path / "run")["shapes"]
    best = max(result["scores"], key=lambda name: result["scores"][name])
    fastest = "16x128x1"  # one head: less to compute in helpers.fake_executor
    assert result["chosen"] == (best if by == "score" else fastest) and result["measured"]
    assert (tmp_path / "run/shapes/search/report.html").is_file()
