"""`jet-export eval` as a user sees it: tables, files, and one message for bad input. The engine is eager."""

import json
import sys

import pytest
from helpers.eager_tiny import tiny_llm, write_bundle
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from jet_export.cli.app import app
from jet_export.evaluation import run, selection
from jet_export.evaluation.compare import Estimate
from jet_export.evaluation.progress import EvaluationProgress
from jet_export.evaluation.tasks import text as tasks_of_text
from jet_export.evaluation.tasks.settings import HELD_OUT
from jet_export.utils.errors import JetExportError

TASK = """
task: capitals
dataset_path: json
output_type: multiple_choice
test_split: test
dataset_kwargs: {data_files: {test: FILE}}
doc_to_text: "import"
doc_to_choice: [" os", " fqzx"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A directory that reads as a bundle; eager engines stand in for what it would load."""
    monkeypatch.setattr(run, "LLM", lambda directory, deterministic: tiny_llm(deterministic))
    return write_bundle(tmp_path / "jet-tiny")


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A small text, for small documents."""
    monkeypatch.setattr(tasks_of_text, "PIECE_BYTES", 1000)
    path = tmp_path / "text.py"
    path.write_text(HELD_OUT.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    return path


def evaluate(*arguments: object):
    return CliRunner().invoke(app, ["eval", *(str(a) for a in arguments)])


def test_a_bundle_and_its_baseline(bundle, text, tmp_path) -> None:
    baseline = write_bundle(tmp_path / "same")
    files = tmp_path / "out" / "eval.json", tmp_path / "samples.jsonl"
    found = evaluate(
        bundle, "--tasks", "recall,bits_per_byte", "--limit", 2, "--text", text, "--baseline", baseline,
        "--json", files[0], "--samples", files[1],
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "bits_per_byte ↓" in found.output and "recall_64" in found.output and "same (baseline)" in found.output
    assert "jet-tiny: loglikelihood_rolling" in found.output and "a paired one" in found.output
    report = json.loads(files[0].read_text())
    bits = report["tasks"]["bits_per_byte"]["metrics"]["bits_per_byte"]
    assert bits["value"] == bits["baseline"]["value"] and 0 < bits["value"] < 3
    assert bits["difference"] == {"value": 0, "stderr": 0, "documents": 2}
    assert report["tasks"]["recall"]["metrics"]["recall"]["value"] == 1  # what jet-tiny was trained for
    assert report["bundle"]["dtype"] == "float32" and report["lm_eval"] and report["environment"]["torch"]
    samples = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(samples) == 2 * 2 * 2 and {s["task"] for s in samples} == {"recall", "bits_per_byte"}


def test_a_directory_of_task_files(bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (tasks / "capitals.yaml").write_text(TASK.replace("FILE", str(tasks / "rows.jsonl")))
    found = evaluate(bundle, "--tasks", tasks)
    assert found.exit_code == 0, found.output
    assert "capitals" in found.output and "1.0000 ± 0.0000" in found.output


def test_a_metric_that_is_no_mean_is_the_harness_own() -> None:
    """Answers that are texts, and means that the task takes otherwise."""
    samples = [
        {"doc_id": i, "filter": "none", "metrics": ["acc", "best", "f1"], "acc": i, "best": i, "f1": ("a", "b", 1)}
        for i in (0, 1)
    ]
    figures = {"acc,none": 0.5, "best,none": 1.0, "best_stderr,none": 0.1, "f1,none": 0.7, "f1_stderr,none": "N/A"}
    found = run._outcome(figures, samples)
    assert found.metrics.keys() == {"acc"}
    assert found.others == {"best": Estimate(1.0, 0.1, 2), "f1": Estimate(0.7, None, 2)}


@pytest.fixture
def without_the_harness_own_tasks(monkeypatch) -> None:
    """Reading their 14,000 files takes many seconds."""
    manager = selection._manager
    monkeypatch.setattr(selection, "_manager", lambda dirs, settings, defaults: manager(dirs, settings, defaults=False))


@pytest.mark.usefixtures("without_the_harness_own_tasks")
def test_bad_input_is_one_message_and_writes_nothing(bundle, text, tmp_path) -> None:
    out = tmp_path / "eval.json"
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in [
        ((bundle, "--tasks", "recal"), "--tasks recal: no such task.\nDid you mean recall?"),
        ((bundle, "--tasks", ","), "--tasks: which?"),
        ((bundle, "--tasks", empty), f"--tasks {empty}: no task in it."),
        ((empty, "--tasks", "recall"), f"{empty}: not a bundle"),
        ((bundle, "--tasks", "recall", "--baseline", empty), f"{empty}: not a bundle"),
        ((bundle, "--tasks", "recall", "--limit", 0), "--limit 0: not a number of documents."),
        ((bundle, "--tasks", "recall", "--lengths", "1k"), "--lengths 1k: not numbers of tokens."),
        ((bundle, "--tasks", "recall", "--lengths", "4096"), "--lengths 4096: not between 64 and 255"),
        ((bundle, "--tasks", "needle_single"), "documents of 512 tokens or more"),
        ((bundle, "--tasks", "recall", "--text", tmp_path / "none"), "No such file"),
        ((bundle, "--tasks", "recall", "--samples", tmp_path), f"--samples {tmp_path}: is a directory."),
    ]:
        found = evaluate(*arguments, "--json", out)
        assert isinstance(found.exception, JetExportError), found.output  # main() prints it: exit status 2
        assert message in str(found.exception)
    assert not out.exists()


def test_without_the_extra(bundle, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    found = evaluate(bundle, "--tasks", "recall")
    assert "pip install 'jet-export[eval]'" in str(found.exception)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal() -> None:
    lines: list[str] = []
    now = 0.0
    progress = EvaluationProgress(lines.append, lambda: now)
    progress.label = "b"
    with progress:
        for done in range(101):
            progress("loglikelihood", done, 100)
            now += 1
    assert lines == [
        "  b: loglikelihood ...",
        "  b: loglikelihood: 30/100, 70 s left",
        "  b: loglikelihood: 60/100, 40 s left",
        "  b: loglikelihood: 90/100, 10 s left",
        "  b: loglikelihood: 100.0 s",
    ]
