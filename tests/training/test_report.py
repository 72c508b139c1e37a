"""What a run shows and records, and the FLOPs that its MFU counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.retrofits import VOCAB, models

from jet_export.training.flops import flops_per_token
from jet_export.training.recipe import Recipe, StageRecipe
from jet_export.training.report import Report, StepRecord, describe, duration
from jet_export.training.student import set_trainable

RECORD = StepRecord(
    step=1, stage="s", loss=2.5, parts={"kl": 0.5, "ce": 2.0}, lr=1e-3, grad_norm=0.1, tokens=64, tokens_per_s=12345.6,
    mfu=None, seconds=0.1,
)  # fmt: skip


def test_a_line_says_loss_parts_rate_and_speed() -> None:
    assert describe(RECORD) == "loss 2.5000, kl 0.5000, ce 2.0000, lr 1.0e-03, 12,346 tokens/s"
    assert describe(replace(RECORD, parts={"layer_0": 2.5}, mfu=0.4)).endswith("lr 1.0e-03, 12,346 tokens/s, MFU 40%")
    assert [duration(s) for s in (3, 600, 36000)] == ["3 s", "10 min", "10.0 h"]


def test_lines_come_every_so_often_and_at_both_ends(tmp_path: Path) -> None:
    lines: list[str] = []
    report = Report(tmp_path, lines.append, every=4, tensorboard=False, bars=False)
    with report.stage("s", 0, 9):
        for i in range(1, 10):
            report.step(replace(RECORD, step=i), i)
    report.close()
    assert [line.split(":")[0] for line in lines] == ["stage s", *(f"  step {i}/9" for i in (1, 4, 8, 9))]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 9


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 6)) + '{"step": 6, "lo')
    Report(tmp_path, print, done=3, tensorboard=False, bars=False).close()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("loss", ["features", "logits"])
def test_flops_count_each_product(recipe: Recipe, loss: str) -> None:
    student, teacher = models(recipe)
    set_trainable(student, ("jet",))
    linear = {n: p.numel() for n, p in student.named_parameters() if n.endswith("proj.weight") or "w2.weight" in n}
    jet = sum(n for name, n in linear.items() if name.startswith("layers.0.self_attn"))
    theirs = sum(p.numel() for n, p in teacher.named_parameters() if n.endswith("proj.weight"))
    head = VOCAB * 32
    found = flops_per_token(student, teacher, StageRecipe(loss=loss))
    if loss == "features":  # teacher's layers; JetBlocks forward, and backward into their weights
        assert found == 2 * (theirs + 2 * jet)
    else:  # both forward, backward into activations and into JetBlocks' weights
        assert found == 2 * (theirs + head + 2 * (sum(linear.values()) + head) + jet)
