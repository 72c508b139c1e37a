"""`jet-export simulate`: what it prints and writes, and bad options."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jet_export.cli.app import app
from jet_export.utils.errors import JetExportError

LOAD = ("simulate", "--model", "jet-2b", "--fp8", "--rate", "120", "--requests", "400")


def test_auto_finds_the_replicas_and_writes_the_report(tmp_path: Path) -> None:
    slo = ("--replicas", "auto", "--slo", "ttft=200ms,tpot=6ms", "--output", str(tmp_path / "out"))
    ran = CliRunner().invoke(app, [*LOAD, *slo], catch_exceptions=False)
    assert "replicas: enough" in ran.output and "GPU hours" in ran.output and "off by" in ran.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    replicas = result["summary"]["most_replicas"]
    assert replicas == min(t["replicas"] for t in result["tried"] if t["met"]) > 1
    assert result["summary"]["slo"]["met"] >= 0.99 and result["engine"].startswith("jet-2b fp8 on NVIDIA H100")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "SLO ttft 200 ms, tpot 6 ms" in page and "Plotly.newPlot" in page and 'src="http' not in page
    assert len((tmp_path / "out" / "requests.csv").read_text().splitlines()) == 1 + result["summary"]["requests"]


def test_one_load_gives_one_result(tmp_path: Path) -> None:
    options = [*LOAD, "--turns", "3", "--replicas", "2", "--mtbf-hours", "0.02", "--autoscale", "2:3"]
    outputs = [CliRunner().invoke(app, options, catch_exceptions=False).output for _ in range(2)]
    assert "prefix cache" in outputs[0]
    assert [line for line in outputs[0].splitlines() if "simulate:" not in line] == [
        line for line in outputs[1].splitlines() if "simulate:" not in line
    ]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model", "jet-2b", "--fp8"], "give --trace or --rate"),
        (["--rate", "1"], "give a bundle or --model"),
        (["--model", "jet-2b", "--fp8", "--rate", "1", "--replicas", "auto"], "needs an SLO"),
        (["--model", "jet-2b", "--fp8", "--rate", "1", "--replicas", "none"], "neither a number"),
        (["--model", "jet-2b", "--fp8", "--rate", "1", "--router", "best"], "router 'best' is not known"),
        (["--model", "jet-2b", "--fp8", "--rate", "1", "--autoscale", "3"], "not MIN:MAX"),
        (["--model", "jet-2b", "--fp8", "--rate", "1", "--max-seq-len", "8"], "no request of the load fits 8"),
        (["--model", "jet-tiny", "--rate", "1"], "simulate: this package has no measured table of jet-tiny bf16"),
    ],
)
def test_bad_options_are_named(options: list[str], said: str) -> None:
    with pytest.raises(JetExportError, match=said):
        CliRunner().invoke(app, ["simulate", *options], catch_exceptions=False)
