"""`jet-export verify --ladder`: rungs that run here pass, others are skipped, and the first failure stops."""

import json
import sys
from pathlib import Path

import onnx
import pytest
import torch
from helpers.short_tiny import write_short_tiny

from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import describe_files
from jet_export.cli import app as cli
from jet_export.cli.verify import run_ladder
from jet_export.kernels.common import INTERPRET
from jet_export.ladder import climb, rungs, runs
from jet_export.ladder.climb import LadderOptions, in_own_process, run_rungs, summary, table
from jet_export.ladder.inputs import RUNS, random_inputs
from jet_export.ladder.rungs import RUNGS, Outcome, Skipped
from jet_export.ladder.site import Site
from jet_export.utils.errors import JetExportError
from jet_export.verify.parity import Measure

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")
ORDER = ["kernels", "plugin objects", "plugin outputs", "onnx", "engine, layer by layer", "logits"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The ONNX graph of a trained layer of each kind."""
    folder = tmp_path_factory.mktemp("ladder")
    model, out = write_short_tiny(folder / "short-tiny"), folder / "short-tiny-onnx"
    options = BuildOptions(
        model=str(model), backend="onnx", device="cpu", max_batch_size=4, max_seq_len=512, output=out
    )
    run_build(make_plan(options), ["jet-export", "build", "--backend", "onnx"], lambda line: None)
    return out


@CPU_ONLY
def test_a_model_climbs_as_far_as_a_cpu_goes(bundle, headers, tmp_path, capsys):
    report = tmp_path / "out" / "ladder.json"
    status = run_ladder(LadderOptions(bundle=bundle, report=report, tensorrt_headers=headers), lambda line: None)
    result = json.loads(report.read_text())
    found = {rung["rung"]: rung["status"] for rung in result["rungs"]}
    assert list(found) == ORDER
    assert found == dict.fromkeys(ORDER, "skipped") | dict.fromkeys(["kernels", "plugin objects", "onnx"], "passed")
    reasons = {rung["rung"]: rung.get("reason") for rung in result["rungs"]}
    assert reasons["plugin outputs"] == "no GPU" and "holds no engine" in reasons["logits"]
    assert result["outcome"] == "incomplete" and status == 3  # skipped is not passed
    assert "INCOMPLETE: 3 of 6 rungs passed" in capsys.readouterr().out
    onnx_rung = result["rungs"][3]["figures"]
    assert 0 <= onnx_rung["decode"]["logits"] < 0.1 and {"prefill", "chunked prefill"} <= onnx_rung.keys()
    assert result["environment"]["torch"] == torch.__version__ and result["environment"]["gpu"] == "none"
    assert result["bundle"]["model"] == "short-tiny" and str(bundle.parent) not in report.read_text()


def test_a_bundle_without_a_graph_has_its_model_exported_again(bundle, tmp_path):
    """Tied embeddings stay one tensor, and the graph is that of the bundle."""
    other, work = tmp_path / "other", tmp_path / "work"
    other.mkdir(), work.mkdir()
    for file in bundle.iterdir():
        if file.name != "model.onnx":
            (other / file.name).symlink_to(file)
    again = Site(bundle=other, work=work).graph()
    assert again.parent == work
    names = [
        {t.name for t in onnx.load(p, load_external_data=False).graph.initializer}
        for p in (again, bundle / "model.onnx")
    ]
    assert names[0] == names[1]


def spoil(bundle: Path, to: Path) -> Path:
    """A copy whose graph has one JetBlock with another eps, with the hashes of its files in the manifest."""
    to.mkdir()
    for file in bundle.iterdir():
        (to / file.name).symlink_to(file)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    node = next(n for n in graph.graph.node if n.op_type == "JetBlock")
    next(a for a in node.attribute if a.name == "norm_eps").f = 0.1
    (to / "model.onnx").unlink()
    onnx.save(graph, to / "model.onnx")
    values = json.loads((bundle / "manifest.json").read_text())
    (to / "manifest.json").unlink()
    (to / "manifest.json").write_text(json.dumps(values | {"files": describe_files(to)}))
    return to


def test_a_seeded_fault_stops_the_climb(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(climb, "RUNGS", {name: RUNGS[name] for name in ORDER[3:]})
    site = Site(bundle=spoil(bundle, tmp_path / "spoilt"), work=tmp_path)
    failed, *rest = run_rungs(site, lambda line: None)
    assert failed["rung"] == "onnx" and failed["status"] == "failed"
    assert any("layers.0.self_attn" in line and "bound" in line for line in failed["failures"])
    assert [(r["status"], r["reason"]) for r in rest] == [("not run", "onnx failed")] * 2


def test_a_rung_that_dies_has_failed(bundle, tmp_path):
    found = in_own_process("no such rung", Site(bundle=bundle, work=tmp_path), lambda line: None)
    assert found["status"] == "failed"
    assert "its process ended with status 1" in found["failures"][0] and "KeyError" in found["failures"][0]


def run_all(monkeypatch, outcomes: dict) -> dict:
    """Run rungs with these outcomes in this process."""
    seen = []

    def in_process(name, site, emit):
        seen.append(name)
        return rungs.run(name, site)

    def rung(found):
        def do(site):
            if isinstance(found, Exception):
                raise found
            return found

        return do

    made = {name: rung(found) for name, found in outcomes.items()}
    monkeypatch.setattr(climb, "RUNGS", made)
    monkeypatch.setattr(rungs, "RUNGS", made)
    monkeypatch.setattr(climb, "in_own_process", in_process)
    found = run_rungs(Site(bundle=Path("b"), work=Path("w")), lambda line: None)
    return {"rungs": found, "outcome": climb.outcome(found), "seen": seen}


def test_outcomes(monkeypatch):
    good, bad = Outcome({"x": 1.0}), Outcome({}, ["a: too large", "b", "c", "d", "e"])
    passed = run_all(monkeypatch, {"a": good, "b": good})
    assert passed["outcome"] == "passed" and summary(passed) == "PASSED: all 2 rungs"
    part = run_all(monkeypatch, {"a": good, "b": Skipped("no GPU"), "c": good})
    assert part["outcome"] == "incomplete" and "2 of 3 rungs passed" in summary(part)
    failed = run_all(monkeypatch, {"a": Skipped("no GPU"), "b": bad, "c": good})
    assert failed["outcome"] == "failed" and failed["seen"] == ["a", "b"] and summary(failed) == "FAILED at: b"
    refused = run_all(monkeypatch, {"a": JetExportError("where: what.", "what to do.")})
    assert refused["rungs"][0]["failures"] == ["where: what.\nwhat to do."]
    rows = [list(column.cells) for column in table(failed).columns]
    assert rows[0] == ["a", "b", "c"] and rows[1] == ["skipped", "FAILED", "not run"]
    assert rows[3] == ["no GPU", "a: too large\nb\nc\nand 2 more", "b failed"]


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the rung runs the model's own kernels")
def test_a_wrong_kernel_fails_the_first_rung(monkeypatch, tmp_path):
    monkeypatch.setattr(rungs, "small_cases", lambda site: runs.SMALL[1:2])
    monkeypatch.setattr(rungs, "SMALL_RUNS", {"decode": runs.SMALL_RUNS["decode"]})
    site = Site(bundle=tmp_path, work=tmp_path)
    assert not rungs.kernels(site).failures
    right = rungs.launch_interpreted
    monkeypatch.setattr(rungs, "launch_interpreted", lambda inputs: [x * 1.001 for x in right(inputs)])
    (line,) = rungs.kernels(site).failures
    assert line.startswith("Attention 4 / 2 heads of 32") and "decode: relative error 0.001, bound 1e-05" in line


def test_failures_of_an_engine_go_to_their_rung(tmp_path):
    """Those of states to the layers' rung, those of logits and text to the last one."""

    def measure(what: str) -> Measure:
        return Measure(
            stage="decode",
            what=what,
            max_abs=1.0,
            relative=0.5,
            relative_bound=0.1,
            worst_row=0.5,
            worst_row_bound=0.1,
            kl=1.0,
            kl_bound=0.1,
        )

    lines = [line for what in ("layers.3.recurrent_state", "logits") for line in measure(what).failures()]
    lines += ["reads, to the bit: x", "held-out text: KL is nan", "decode by CUDA graph: logits differ"]
    stage = {"stage": "decode", "failures": lines, "measures": [{"what": "layers.3.k", "relative": 0.5}]}
    found = {"stages": [stage], "failures": lines, "quality": None}
    (tmp_path / "verification.json").write_text(json.dumps(found))
    site = Site(bundle=tmp_path, work=tmp_path)
    layers, last = rungs.engine_layers(site), rungs.logits(site)
    assert sorted(layers.failures + last.failures) == sorted(lines)
    assert all("recurrent_state" in line or line.startswith("reads") for line in layers.failures)
    assert layers.failures and all("logits" in line or "held-out" in line for line in last.failures)
    assert layers.figures["largest relative error"] == {"layers.3.k": 0.5}


def test_random_inputs_reach_past_a_window_and_hold_padding():
    for case in runs.SMALL:
        inputs = random_inputs(case, *RUNS["ragged prefill"], "cpu")
        assert -1 in inputs.tensors[-2].tolist()
        o, *states = inputs.op()
        assert o[1:64].abs().max() == 0  # the padding row's
        for state, before in zip(states, inputs.states(), strict=True):
            assert not torch.equal(state, before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["verify"], "verify: which bundle?\nName one made by `jet-export build`, or pass --ladder."),
        (["verify", "x", "--fetch-headers"], "--tensorrt-headers and --fetch-headers belong to --ladder."),
        (["verify", "--ladder", "x"], "x: not a bundle (no manifest.json)."),
        (["verify", "--ladder", "x", "--text", "y.txt"], "--text y.txt: no such file."),
    ],
)
def test_bad_input_is_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["jet-export", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
