"""The numbers of `local-completions` against a deterministic server are those of `jet-export eval`, bit for bit."""

import pytest
from helpers.eager_tiny import LIMITS, tiny_engine, tiny_llm
from helpers.serving import server

pytest.importorskip("fastapi")
pytest.importorskip("lm_eval")

from jet_export.evaluation.model import EngineLM, prefix_token
from jet_export.evaluation.run import run_tasks
from jet_export.evaluation.selection import load_tasks, quiet_harness
from jet_export.evaluation.tasks import text as tasks_of_text
from jet_export.evaluation.tasks.settings import HELD_OUT, TaskSettings
from jet_export.model.hub import JET_TINY_DIR
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.server.openai.chat import load_tokenizer_config

TASKS = ("recall", "bits_per_byte", "code_completion")


@pytest.mark.timeout(120)
def test_both_have_the_same_numbers(tmp_path, monkeypatch) -> None:
    quiet_harness()
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setattr(tasks_of_text, "PIECE_BYTES", 1000)
    text = tmp_path / "text.py"
    text.write_text(HELD_OUT.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    settings = TaskSettings(bundle=str(JET_TINY_DIR), max_length=LIMITS.max_seq_len - 1, text=str(text))
    loaded = load_tasks(TASKS, settings)
    llm = tiny_llm(deterministic=True)
    ours = EngineLM(llm, prefix_token(JET_TINY_DIR, llm.tokenizer, llm.eos))
    tasks, _ = run_tasks(ours, loaded, limit=2)

    batching = BatchingEngine(tiny_engine(), load_tokenizer(JET_TINY_DIR), 0, Serving(deterministic=True))
    config = load_tokenizer_config(JET_TINY_DIR)
    with server(AsyncLLM.over(batching), names=("jet-tiny",), tokenizer_config=config) as address:
        theirs = LocalCompletionsAPI(
            model="jet-tiny",
            base_url=f"{address}/v1/completions",
            tokenizer_backend="remote",
            num_concurrent=4,
            max_length=LIMITS.max_seq_len,
        )
        served, _ = run_tasks(theirs, loaded, limit=2)

    assert ours.prefix == theirs.prefix_token_id and ours.max_length == theirs.max_length
    assert tasks.keys() == served.keys() == set(TASKS)
    for name in TASKS:
        assert [s["resps"] for s in tasks[name].samples] == [s["resps"] for s in served[name].samples]
        assert tasks[name].metrics == served[name].metrics
    assert 0 < tasks["bits_per_byte"].metrics["bits_per_byte"].estimate().value < 3
