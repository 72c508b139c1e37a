"""Packages compiled side by side: when, that they equal those compiled in this process, and failures."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.eager_bundle import write_mini_config

from jet_export.backends.eager import load_eager
from jet_export.backends.inductor import compile_worker
from jet_export.backends.inductor.compile_worker import GPU_BYTES, HOST_BYTES, CompileMemory, compile_side_by_side
from jet_export.backends.load import check_bundle, load_engine
from jet_export.build import build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import Manifest
from jet_export.cli import app as cli
from jet_export.model.weights import save_tensors
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

JET_2B = 3_900_000_000
MODES = ("prefill", "decode")


@pytest.mark.parametrize(
    ("device", "processes", "gpu_free", "host_free", "expected"),
    [
        ("cuda", 2, 80_000_000_000, 64_000_000_000, True),
        ("cuda", 2, 3 * JET_2B + 2 * GPU_BYTES, 2 * HOST_BYTES, True),
        ("cuda", 2, 3 * JET_2B + 2 * GPU_BYTES - 1, 64_000_000_000, False),
        ("cuda", 2, 80_000_000_000, 2 * HOST_BYTES - 1, False),
        ("cuda", 3, 3 * JET_2B + 2 * GPU_BYTES, 64_000_000_000, False),
        ("cpu", 2, 80_000_000_000, 64_000_000_000, False),
    ],
)
def test_side_by_side_if_every_copy_of_the_weights_fits(device, processes, gpu_free, host_free, expected) -> None:
    memory = CompileMemory(device=device, weights=JET_2B, gpu_free=gpu_free, host_free=host_free)
    assert memory.holds(processes) is expected


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.setattr(build, "room_apart", lambda plan, weights: True)


def test_a_bundle_compiled_side_by_side(apart, tmp_path) -> None:
    """FP8 projections and an FP8 KV cache are rebuilt from the manifest: the engine computes what the model does."""
    pytest.importorskip("modelopt")
    output = tmp_path / "out" / "bundle"
    lines: list[str] = []
    options = BuildOptions(
        model=str(write_mini_config(tmp_path, layer_types=["jet", "attn"], num_hidden_layers=2)),
        device="cpu",
        fp8=True,
        kv_cache_dtype="fp8",
        max_batch_size=2,
        max_seq_len=128,
        random_weights=True,
        output=output,
    )
    build.run_build(make_plan(options), ["jet-export", "build"], lines.append)
    assert sum(line.startswith("  compile prefill, decode side by side: ") for line in lines) == 1
    assert {line.split(":")[0].strip() for line in lines if line.startswith("    ")} >= {*MODES}
    assert [p.name for p in output.parent.iterdir()] == ["bundle"]
    manifest = Manifest.load(output)
    check_bundle(output, manifest)
    assert sorted(manifest.files) == ["decode.pt2", "prefill.pt2", "weights.safetensors"]
    assert manifest.quantization and manifest.quantization["fp8"] and manifest.quantization["kv_scales"]
    prompts = [list(range(3, 60)), list(range(9))]
    engines = load_engine(output)[0], load_eager(output, manifest)
    compiled, eager = (
        LLM.over(engine, ByteTokenizer(), -1).generate(prompts, 5, return_logits=True) for engine in engines
    )
    for a, b in zip(compiled, eager, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(a.logits, b.logits, rtol=2e-2, atol=2e-2)


def test_a_failing_process_is_one_message_and_leaves_nothing(apart, tmp_path, monkeypatch, capsys) -> None:
    def without_one(tensors, path: Path) -> None:
        save_tensors({k: v for k, v in tensors.items() if k != "layers.0.mlp.down_proj.weight"}, path)

    monkeypatch.setattr(build, "save_tensors", without_one)
    model, output = str(write_mini_config(tmp_path)), tmp_path / "out" / "bundle"
    monkeypatch.setattr(
        sys,
        "argv",
        ["jet-export", "build", "--model", model, "--random-weights", "--device", "cpu", "--output", str(output)],
    )
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "package does not compile (exit status 1)" in err
    assert "weight layers.0.mlp.down_proj.weight is missing" in err
    assert list(output.parent.iterdir()) == []


def commands(monkeypatch, **code: str) -> None:
    monkeypatch.setattr(compile_worker, "worker_command", lambda directory, mode: [sys.executable, "-c", code[mode]])


def ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


SLEEP = """
import os, subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path("{0}.part").write_text(f"{{os.getpid()}} {{child.pid}}")
os.rename("{0}.part", "{0}")
child.wait()
"""
FAIL = """
import os, sys, time
while not os.path.exists("{0}"):
    time.sleep(0.05)
print("first")
sys.exit("\\n".join(f"line {{i}}" for i in range(50)))
"""


def test_the_other_process_and_its_compilers_are_ended(tmp_path, monkeypatch) -> None:
    pids = tmp_path / "pids"
    commands(monkeypatch, prefill=SLEEP.format(pids), decode=FAIL.format(pids))
    with pytest.raises(JetExportError) as e:
        compile_side_by_side(tmp_path, MODES, print)
    assert str(e.value).startswith("the decode package does not compile (exit status 1).\n  line 38\n")
    assert str(e.value).endswith("\n  line 49")
    deadline = time.monotonic() + 10  # an orphan is reaped by whoever adopts it
    while not all(ended(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_is_killed(tmp_path, monkeypatch) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    commands(monkeypatch, prefill="", decode=kill)
    with pytest.raises(JetExportError, match=r"the decode package does not compile \(its process dies of SIGKILL\)"):
        compile_side_by_side(tmp_path, MODES, print)


def test_a_worker_of_another_parent_does_nothing(tmp_path) -> None:
    """Like one whose parent ended before the worker could ask to end with it."""
    command = [*compile_worker.worker_command(tmp_path, "prefill")[:-1], str(os.getpid() + 1)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
