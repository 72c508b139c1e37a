"""Running out of GPU memory is one message and exit status 2, in the process itself and from a worker."""

import sys

import pytest
import torch

from jet_export.backends.inductor import compile_worker
from jet_export.backends.inductor.compile_worker import compile_side_by_side
from jet_export.cli import app as cli
from jet_export.utils.errors import JetExportError, out_of_gpu_memory

SAID = (
    "CUDA out of memory. Tried to allocate 14.00 MiB. "
    "GPU 0 has a total capacity of 79.18 GiB of which 1.31 MiB is free."
)
MORE = " Process 673 has 714.00 MiB memory in use. See documentation for Memory Management"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"Traceback\n  File x\ntorch.OutOfMemoryError: {SAID}{MORE}", SAID),
        (f"InductorError: RuntimeError: Failed to run autotuning code block: {SAID}{MORE}", SAID),
        ("torch.AcceleratorError: CUDA error: out of memory\nSearch for it", "CUDA error: out of memory."),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied", None),
        ("out of memory, says a comment", None),
    ],
)
def test_the_sentence_about_memory_is_found(text, said) -> None:
    assert out_of_gpu_memory(text) == said


def test_the_command_line_reports_it(monkeypatch, capsys) -> None:
    def app() -> None:
        raise torch.OutOfMemoryError(SAID + MORE)

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {SAID}\nOther processes hold it") and "Traceback" not in err


def test_other_errors_are_not_hidden(monkeypatch) -> None:
    def app() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_a_worker_reports_it(monkeypatch, tmp_path) -> None:
    code = f"import sys; print('Traceback'); sys.exit('torch.OutOfMemoryError: {SAID}{MORE}')"
    monkeypatch.setattr(compile_worker, "worker_command", lambda directory, mode: [sys.executable, "-c", code])
    with pytest.raises(JetExportError) as e:
        compile_side_by_side(tmp_path, ["decode"], lambda line: None)
    assert str(e.value).startswith(f"the decode package does not compile: {SAID}\nOther processes hold it")
