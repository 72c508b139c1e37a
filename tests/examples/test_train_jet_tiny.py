"""The training form equals the published model, the chunked delta rule the recurrence; the data match their list."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.compare import relative_error
from jet_tiny import corpus
from jet_tiny.data import Batches, Data
from jet_tiny.delta_rule import ChunkScan, UnitLowerInverse, delta_rule_chunked, delta_rule_recurrent
from jet_tiny.evaluate import windows
from jet_tiny.model import JetTiny
from jet_tiny.optimizer import lr_scale, newton_schulz
from jet_tiny.recall import ANSWER_TOKENS, RecallTask
from safetensors import safe_open
from tokenizers import Tokenizer
from train_jet_tiny import train

from jet_export.model.config import JetNemotronConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "jet_export" / "data" / "jet-tiny"
GOLDENS = sorted((ROOT / "tests" / "data").glob("*.safetensors"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def held_out_ids(tokenizer: Tokenizer) -> np.ndarray:
    text = (FOLDER.parent / "heldout.txt").read_text()[:40_000]
    return np.array(tokenizer.encode(text).ids, dtype=np.int32)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_logits_are_the_published_models(path: Path) -> None:
    with safe_open(path, "pt") as f:
        config = JetNemotronConfig.from_dict(json.loads(f.metadata()["config"]))
        weights = {k.removeprefix("weight."): f.get_tensor(k) for k in f.keys() if k.startswith("weight.")}  # noqa: SIM118
        ids, prefill, decode = (f.get_tensor(k) for k in ("input_ids", "logits.prefill", "logits.decode"))
    dtype = weights["model.embed_tokens.weight"].dtype
    model = JetTiny(config, dtype)
    model.load_state_dict(weights)  # strict: the published names and shapes
    with torch.no_grad():
        logits = model(ids)
    length = prefill.shape[1]
    bound = 5e-2 if dtype == torch.bfloat16 else 1e-5 if length <= 64 else 3e-3
    assert relative_error(logits[:, :length], prefill) < bound
    assert relative_error(logits[:, length:], decode) < bound


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_chunked_is_recurrent_with_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, 3, length, *shape, generator=generator, dtype=torch.float64)

    # Keys nearly parallel and beta near 1: the hard case for the inverse.
    q, k = F.normalize(random(32), dim=-1), F.normalize(random(32) + 3, dim=-1)
    inputs = [q, k, random(16), 0.8 + 0.2 * random().sigmoid(), -0.1 * random().abs()]
    inputs = [x.requires_grad_() for x in inputs]
    want, got = delta_rule_recurrent(*inputs), delta_rule_chunked(*inputs)
    assert relative_error(got, want) < 1e-12
    direction = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(want, inputs, direction), strict=True
    ):
        assert (a - b).norm() <= 1e-11 * (b.norm() + 1)


def test_inverse_is_stable_where_the_neumann_series_is_not() -> None:
    a = torch.ones(64, 64).tril(-1)  # powers reach 1e17
    identity = torch.eye(64)
    assert ((identity + a) @ UnitLowerInverse.apply(a) - identity).abs().max() < 1e-5


def test_gradients_of_the_custom_functions() -> None:
    a = torch.randn(2, 8, 8, dtype=torch.float64).tril(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: UnitLowerInverse.apply(x.tril(-1)), (a,))
    m = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ChunkScan.apply, (m, b))


def test_no_position_sees_a_later_token() -> None:
    model = JetTiny(JetNemotronConfig.from_json_file(FOLDER / "config.json"))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(1, 4096, (1, 150), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 100] = 0
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:100].max() < 1e-5 < difference[100:].max()


def test_newton_schulz_orthogonalises() -> None:
    x = newton_schulz(torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(x)
    assert singular.min() > 0.5 and singular.max() < 1.4


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    scales = [lr_scale(p) for p in (0.0, 0.01, 0.02, 0.4, 0.7, 1.0, 1.1)]
    assert scales == pytest.approx([0.05, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])


def test_recall_answers_repeat_their_definition(tokenizer: Tokenizer, held_out_ids: np.ndarray) -> None:
    task = RecallTask(tokenizer)
    rows = task.rows(held_out_ids, 8, 1025, seed=0)
    assert sum(len(row.answers) for row in rows) > 50
    for row in rows:
        assert len(row.tokens) == len(row.weights) == 1025
        for position, distance in row.answers:
            query, definition = position - 1, position - 1 - distance
            assert row.tokens[query] == task.query and row.tokens[definition] == task.equals
            key = slice(query - 4, query), slice(definition - 4, definition)
            assert (row.tokens[key[0]] == row.tokens[key[1]]).all()
            value = row.tokens[definition + 1 : definition + 1 + ANSWER_TOKENS]
            assert (row.tokens[position : position + ANSWER_TOKENS] == value).all()
            assert (row.weights[position : position + ANSWER_TOKENS] > 1).all()
            assert (row.weights[definition : definition + 1 + ANSWER_TOKENS] == 0).all()


@pytest.mark.parametrize("length", [2, 3, 8, 9, 12, 13, 40])
def test_every_token_is_scored_once(length: int) -> None:
    ids = list(range(length))
    scored = [t for inputs, targets in windows(ids, size=8) for t in targets if t >= 0]
    assert scored == ids[1:]
    for inputs, targets in windows(ids, size=8):
        assert all(t in (-100, i + 1) for i, t in zip(inputs, targets, strict=True))


def test_the_split_depends_on_the_path_alone() -> None:
    files = corpus.read_list(FOLDER / "corpus.json")["files"]
    assert all((e["split"] == "heldout") == corpus.is_held_out(e["path"]) for e in files)
    assert len({e["sha256"] for e in files}) == len(files)  # no file twice, so none on both sides


def test_changed_and_absent_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    listing = {
        "files": [
            {"path": "a.py", "sha256": corpus.sha256(b"a = 1\n"), "split": "train"},
            {"path": "b.py", "sha256": corpus.sha256(b"b = 2\n"), "split": "train"},
            {"path": "c.py", "sha256": corpus.sha256(b""), "split": "heldout"},
        ]
    }
    files, wrong = corpus.load(listing, tmp_path)
    assert files == {"a.py": b"a = 1\n"} and wrong == ["b.py", "c.py"]


def test_training_lowers_the_loss(tokenizer: Tokenizer, held_out_ids: np.ndarray, tmp_path: Path) -> None:
    raw = json.loads((FOLDER / "config.json").read_text())
    raw.update(hidden_size=64, intermediate_size=64, layer_types=["jet", "swa", "attn"], num_hidden_layers=3)
    raw.update(num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    raw["efficient_attention_config"]["jet"].update(num_heads=2, head_dim=32)
    data = Data(tokenizer, held_out_ids, held_out_ids, [])
    args = argparse.Namespace(
        device="cpu",
        seed=0,
        compile=False,
        dropout=0.0,
        batch=4,
        length=128,
        recall_pool=8,
        max_seconds=600.0,  # never reached: 24 steps decide, however busy the machine
        max_steps=24,
        log_every=8,
        output=tmp_path,
    )
    _, record = train(JetNemotronConfig.from_dict(raw), data, args, time.perf_counter())
    losses = [point["loss"] for point in record["curve"]]
    assert losses[-1] < losses[0] - 0.3
    batches = Batches(data, 4, 128, "cpu", 8)
    inputs, targets, weights = batches.next()
    assert (inputs[:, 1:] == targets[:, :-1]).all() and weights.shape == targets.shape
