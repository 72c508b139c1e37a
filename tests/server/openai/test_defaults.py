"""--generation-config auto: sampling defaults of generation_config.json, for what a request leaves out."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from helpers.scripted_engine import ScriptedEngine

from jet_export.runtime.sampling import Sampling
from jet_export.server.openai.app import create_app
from jet_export.server.openai.chat import ChatTemplate
from jet_export.server.openai.defaults import load_sampling_defaults
from jet_export.server.openai.options import ApiOptions
from jet_export.utils.errors import JetExportError

PUBLISHED = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "min_p": None,
}


def asked(defaults: dict[str, float], **changes) -> tuple[Sampling, float]:
    engine = ScriptedEngine(("x", "stop"))
    options = ApiOptions.of({**ApiOptions(names=("mini",), sampling_defaults=defaults).without_key()}, None)
    client = TestClient(create_app(engine, options, ChatTemplate("{{ messages[0].content }}", {})))
    for path, body in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        answer = client.post(f"/v1/{path}", json={"model": "mini", "seed": 1, **body, **changes})
        assert answer.status_code == 200, answer.text
    (_, first), (_, second) = engine.submitted
    assert first.sampling == second.sampling and first.repetition_penalty == second.repetition_penalty
    return first.sampling, first.repetition_penalty


def test_fields_that_are_left_out_have_them(tmp_path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(PUBLISHED))
    defaults = load_sampling_defaults(tmp_path)
    published = Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=1)
    assert asked(defaults) == (published, 1.05)
    assert asked(defaults, temperature=None) == (published, 1.05)
    given = {"temperature": 0, "repetition_penalty": 1, "top_k": 0}
    assert asked(defaults, **given) == (replace(published, temperature=0, top_k=0), 1.0)
    assert asked({}) == (Sampling(temperature=1.0, seed=1), 1.0)


def test_nothing_to_take(tmp_path) -> None:
    assert load_sampling_defaults(tmp_path) == {}


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("top_p", "x"), ("top_k", 1.5), ("min_p", True)])
def test_values_that_no_request_could_have(tmp_path, name, value) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(JetExportError, match=rf"generation_config.json: {name}"):
        load_sampling_defaults(tmp_path)
