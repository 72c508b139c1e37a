"""The model repository, the fields of requests, and the checks of an installed tritonserver; no server runs here."""

import json
import os
import socket
import stat
import sys
from pathlib import Path

import pytest
from helpers.paths import DOCS

pytest.importorskip("pydantic")

from helpers.eager_bundle import mini_config

from jet_export.cli import app as cli
from jet_export.runtime.capacity import Serving
from jet_export.runtime.grammar import Grammar
from jet_export.server.triton import installation as installed
from jet_export.server.triton import tritonserver
from jet_export.server.triton.installation import PYTHON, Installation, check_stub, find_server
from jet_export.server.triton.metrics import samples
from jet_export.server.triton.repository import Repository, gpu_indices, write_repository
from jet_export.server.triton.request import RequestFields, parse_request
from jet_export.server.triton.tensors import INPUTS, OUTPUTS
from jet_export.server.triton.tritonserver import Ports, reserve
from jet_export.utils.errors import JetExportError


@pytest.fixture
def bundle(monkeypatch, tmp_path):
    """Only its manifest is read."""

    class Manifest:
        model = {"name": "mini"}  # noqa: RUF012
        config = mini_config()
        device = type("device", (), {"type": "cpu"})

    monkeypatch.setattr("jet_export.bundle.manifest.Manifest.load", lambda directory: Manifest)
    return tmp_path / "bundle"


def config_of(model: Path):
    from google.protobuf import text_format

    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())


def test_a_repository_is_what_triton_reads(bundle, tmp_path) -> None:
    model = write_repository(
        tmp_path / "repo", Repository(bundle, serving=Serving(slots=3, wait_timeout=2.5), instances=2)
    )
    assert [p.name for p in sorted(model.iterdir())] == ["1", "config.pbtxt"] and model.name == "mini"
    assert len((model / "1/model.py").read_text().splitlines()) <= 60
    config = config_of(model)
    assert (config.name, config.backend, config.max_batch_size) == ("mini", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [(g.count, g.kind) for g in config.instance_group] == [(2, 2)]  # KIND_CPU
    parameters = {k: v.string_value for k, v in config.parameters.items()}
    assert parameters["bundle"] == str(bundle) and parameters["slots"] == "3" and parameters["wait_timeout"] == "2.5"
    assert {i.name for i in config.input} == {t.name for t in INPUTS} and all(i.optional for i in config.input)
    assert {o.name for o in config.output} == {t.name for t in OUTPUTS}


@pytest.mark.parametrize("name", ["/elsewhere/mini", "../mini", "owner/mini", "sizes/mini.json"])
def test_a_model_named_by_a_path_lies_in_the_repository(bundle, tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules["jet_export.bundle.manifest"].Manifest.load(bundle).model, "name", name)
    model = write_repository(tmp_path / "repo", Repository(bundle))
    assert model == tmp_path / "repo/mini" and config_of(model).name == "mini"


def test_gpus(bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["jet_export.bundle.manifest"].Manifest.load(bundle).device, "type", "cuda")
    config = config_of(write_repository(tmp_path / "repo", Repository(bundle, instances=1, gpus=gpu_indices("0,3"))))
    assert [(g.count, g.kind, list(g.gpus)) for g in config.instance_group] == [(1, 1, [0, 3])]
    for text, message in (
        ("0,x", "--gpus 0,x: not indices"),
        ("0,0", "different indices"),
        ("-1", "different indices"),
    ):
        with pytest.raises(JetExportError, match=message):
            Repository(bundle, gpus=gpu_indices(text)).files()


def test_a_repository_is_kept_replaced_or_refused(bundle, tmp_path) -> None:
    repo = tmp_path / "repo"
    lines: list[str] = []
    other = repo / "other" / "1"
    other.mkdir(parents=True)
    (repo / "other" / "config.pbtxt").write_text("")
    model = write_repository(repo, Repository(bundle), log=lines.append)
    assert lines[-1] == f"Next: tritonserver --model-repository={repo}"
    before = (model / "config.pbtxt").stat().st_mtime_ns
    write_repository(repo, Repository(bundle), log=lines.append)
    assert "up to date" in lines[-1] and (model / "config.pbtxt").stat().st_mtime_ns == before
    changed = Repository(bundle, serving=Serving(slots=2))
    with pytest.raises(JetExportError, match=r"other settings or changed by hand.*\n.*--force"):
        write_repository(repo, changed)
    assert "slots" not in (model / "config.pbtxt").read_text()
    write_repository(repo, changed, force=True)
    assert 'key: "slots"' in (model / "config.pbtxt").read_text() and other.is_dir()
    (model / "config.pbtxt").write_text("name: 'mini'")
    with pytest.raises(JetExportError, match="did not write"):
        write_repository(repo, changed, force=True)
    home = tmp_path / "home"
    (home / "documents").mkdir(parents=True)
    for place in (home, tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(JetExportError, match="exists and is not a model repository"):
            write_repository(place, changed, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home", "repo"]  # nothing half-written


def test_the_table_in_the_documentation() -> None:
    text = (DOCS / "serving/triton.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 5]
    assert rows == [f"| `{t.name}` | {t.kind} | [{t.dim}] | {t.help} |" for t in (*INPUTS, *OUTPUTS)]


def test_fields_come_from_three_places() -> None:
    assert set(t.name for t in INPUTS) - {"sampling_parameters"} <= set(RequestFields.model_fields)
    fields = parse_request(
        {"text_input": "a", "max_tokens": 3, "sampling_parameters": '{"max_tokens": "9", "temperature": "0.5"}'},
        '{"temperature": 2.0, "top_k": 7, "stop": "x", "triton_enable_empty_final_response": true}',
    )
    p = fields.params
    assert (p.max_new_tokens, p.sampling.temperature, p.sampling.top_k, p.stop) == (3, 0.5, 7, ("x",))
    assert parse_request({"text_input": "a"}).params.sampling.greedy
    assert parse_request({"text_input": "a", "top_k": 5}).params.sampling.temperature == 1
    assert parse_request({"text_input": "a", "seed": 2**64 - 1}).params.sampling.seed == -1
    assert parse_request({"text_input": "a", "stop_words": ["", "b"], "end_id": 3}).params.stop == ("b",)
    assert parse_request({"text_input": "a", "end_id": 3, "stop_token_ids": [4]}).params.stop_ids == (4, 3)
    assert [parse_request({"text_input": "a", k: True}).params.logprobs for k in ("return_log_probs", "stream")] == [
        0,
        None,
    ]
    assert [parse_request({"text_input": "a", "stream": s}).with_prompt for s in (False, True)] == [True, False]


def test_sampling_fields_reach_the_engine() -> None:
    numbers = {"min_p": 0.5, "presence_penalty": 1.5, "frequency_penalty": -1.0, "min_length": 3, "priority": -1}
    p = parse_request({"text_input": "a"}, json.dumps({**numbers, "logit_bias": {"7": "-5"}})).params
    assert (p.sampling.min_p, p.presence_penalty, p.frequency_penalty, p.min_tokens, p.priority) == (
        0.5,
        1.5,
        -1,
        3,
        -1,
    )
    assert p.logit_bias == ((7, -5.0),)


def test_guided_decoding() -> None:
    """TensorRT-LLM's names."""

    def grammar(kind: str, guide: str = "") -> Grammar | None:
        given = {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
        return parse_request({"text_input": "a", **given}).params.grammar

    assert grammar("") is None and grammar("json") == Grammar.json_object()
    assert grammar("json_schema", '{"type": "string"}') == Grammar.json_schema('{"type": "string"}')
    assert grammar("regex", "a+") == Grammar.regex("a+")
    assert grammar("ebnf_grammar", 'root ::= "a"') == Grammar.lark('root ::= "a"')


@pytest.mark.parametrize(
    ("tensors", "parameters", "message"),
    [
        ({}, "", "text_input or input_ids"),
        ({"text_input": "a", "input_ids": [1]}, "", "one of the two"),
        ({"text_input": "a"}, '{"lora_name": "x"}', "lora_name is not supported"),
        ({"text_input": "a"}, '{"beam_width": 2}', "beam_width"),
        ({"text_input": "a"}, '{"n": 2}', "n: Input should be less than or equal to 1"),
        ({"text_input": "a"}, '{"num_return_sequences": 2}', "num_return_sequences"),
        ({"text_input": "a"}, '{"min_length": 50}', "min_tokens 50 is not between"),
        ({"text_input": "a"}, '{"logit_bias": {"x": 1}}', "'x' is not a token id"),
        ({"text_input": "a", "min_p": 2.0}, "", "min_p 2.0"),
        ({"text_input": "a", "guided_decoding_guide": "x"}, "", "needs guided_decoding_guide_type"),
        ({"text_input": "a", "guided_decoding_guide_type": "regex"}, "", "regex needs guided_decoding_guide"),
        ({"text_input": "a", "guided_decoding_guide_type": "structural_tag"}, "", "guided_decoding_guide_type"),
        ({"text_input": "a"}, '{"bad_words": "no"}', "bad_words"),
        ({"text_input": "a"}, '{"max_tokens": "many"}', "max_tokens"),
        ({"text_input": "a"}, "[", "parameters is not JSON"),
        ({"text_input": "a", "sampling_parameters": "[" * 100_000}, "", "sampling_parameters is not JSON"),
        ({"text_input": "a", "sampling_parameters": "3"}, "", "sampling_parameters is not a JSON object"),
        ({"text_input": "a", "temperature": float("nan")}, "", "temperature nan"),
        ({"text_input": "a", "repetition_penalty": float("inf")}, "", "repetition_penalty inf"),
        ({"text_input": "a", "max_tokens": -1}, "", "max_new_tokens is -1"),
        ({"text_input": "a", "stop_words": ["x" * 300]}, "", "stop: at most"),
    ],
)
def test_bad_requests(tensors, parameters, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        _ = parse_request(tensors, parameters).params


def test_samples_of_prometheus_text() -> None:
    text = '# HELP a_b Words here.\n# TYPE a_b histogram\na_b_bucket{le="0.5"} 2\na_b_sum 1.5\n'
    assert list(samples(text)) == [
        ("a_b_bucket", "histogram", "Words here.", {"le": "0.5"}, 2.0),
        ("a_b_sum", "histogram", "Words here.", {}, 1.5),
    ]


def installation(tmp_path, stub: str) -> Installation:
    """A server whose stub is a shell script."""
    server = Installation(binary=tmp_path / "bin" / "tritonserver", backends=tmp_path / "backends")
    server.stub.parent.mkdir(parents=True)
    server.stub.write_text("#!/bin/sh\n" + stub)
    server.stub.chmod(server.stub.stat().st_mode | stat.S_IXUSR)
    return server


def test_a_stub_for_another_python_or_numpy_is_refused(tmp_path, monkeypatch) -> None:
    ours = f"# libpython{PYTHON} numpy._core\nexit 1\n"
    check_stub(installation(tmp_path / "ok", ours))
    with pytest.raises(JetExportError, match=r"is for Python 3.6, and this is Python"):
        check_stub(installation(tmp_path / "python", "# libpython3.6m.so numpy._core\n"))
    with pytest.raises(JetExportError, match=r"does not start: .*libpython3.*not found.*\n.*libpython"):
        check_stub(installation(tmp_path / "library", "echo libpython3.so: not found >&2; exit 127 # numpy._core\n"))
    monkeypatch.setattr("numpy.__version__", "2.3.5")
    with pytest.raises(JetExportError, match=r"numpy 1 only, and this is numpy 2.3.5.*\n.*pip install 'numpy<2'"):
        check_stub(installation(tmp_path / "numpy", ours.replace("numpy._core", "")))
    with pytest.raises(JetExportError, match="has no Python backend"):
        check_stub(Installation(binary=tmp_path / "tritonserver", backends=tmp_path / "none"))


def test_where_a_server_is_found(tmp_path, monkeypatch) -> None:
    server = installation(tmp_path, f"# libpython{PYTHON} numpy._core\nexit 1\n")
    server.binary.parent.mkdir()
    server.binary.write_text("#!/bin/sh\n")
    server.binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(server.binary.parent))
    assert find_server(tmp_path / "scratch") == server
    assert server.environment()["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(JetExportError, match=r"no tritonserver is installed.*\n.*jet-export\[serve\].*--openai"):
        find_server(tmp_path)


def test_ports() -> None:
    free = reserve("127.0.0.1", Ports(http=0, grpc=0, metrics=0))
    assert len({free.http, free.grpc, free.metrics}) == 3 and min(free.http, free.grpc, free.metrics) > 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(JetExportError, match=f"--grpc-port {port}: .*in use.*\n.*0 picks a free one"):
            reserve("127.0.0.1", Ports(http=0, grpc=port, metrics=0))
    with pytest.raises(JetExportError, match="--metrics-port 99999"):
        reserve("127.0.0.1", Ports(http=0, grpc=0, metrics=99999))
    with pytest.raises(JetExportError, match="--http-port"):
        reserve("no.such.host.invalid", Ports(http=0, grpc=0, metrics=0))


def test_command_line(bundle, tmp_path, monkeypatch, capsys) -> None:
    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jet-export", "serve", str(bundle), *args])
        with pytest.raises(SystemExit) as e:
            cli.main()
        captured = capsys.readouterr()
        return int(e.value.code or 0), captured.out + captured.err

    status, out = run("--triton-repo", str(tmp_path / "repo"), "--instances", "2")
    assert status == 0 and (tmp_path / "repo/mini/1/model.py").is_file() and "--rate-limit=execution_count" in out
    for args, message in (
        (("--instances", "0"), "--instances 0"),
        (("--triton-repo", str(tmp_path)), "not a model repository"),
        (("--gpus", "a"), "--gpus a"),
    ):
        status, out = run(*args)
        assert status == 2 and message in out and "Traceback" not in out
    monkeypatch.setattr(tritonserver, "find_server", lambda scratch: installation(tmp_path, ""))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, out = run("--http-port", str(taken.getsockname()[1]))
    assert status == 2 and "in use" in out
