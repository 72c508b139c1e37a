"""Bits per byte, KL and recall: figures of the trained jet-tiny in the eager engine, and laws of the measure."""

import math

import pytest
import torch
from tokenizers import Tokenizer

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.model.hub import JET_TINY_DIR, load_config
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.utils.files import sha256_file
from jet_export.verify import quality
from jet_export.verify.quality import RECALL, Quality, measure_quality, read_queries, unquantised_engine, windows

LIMITS = Limits(max_batch_size=1, max_seq_len=512, prefill_chunk=200)
TEXT = (JET_TINY_DIR.parent / "heldout.txt").read_text()[:3000]


@pytest.fixture(autouse=True, scope="module")
def few_recall_texts(tmp_path_factory):
    """Two of the eight: every text holds queries of both distances that 512 tokens have."""
    path = tmp_path_factory.mktemp("recall") / RECALL.name
    path.write_text("".join(RECALL.read_text(encoding="utf-8").splitlines(True)[:2]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "RECALL", path)
        yield


def manifest(source: str = "jet-tiny, in the package") -> Manifest:
    model = {"name": "jet-tiny", "source": source, "config": load_config("jet-tiny").to_dict()}
    weights = {"model.safetensors": sha256_file(JET_TINY_DIR / "model.safetensors")}
    build = {"inputs": {"weights": weights}}
    return Manifest(
        model=model,
        backend={},
        target={"device": "cpu"},
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        state_dtype="float32",
        limits=LIMITS,
        build=build,
    )


def engine() -> EagerEngine:
    model = JetNemotronForCausalLM.from_pretrained("jet-tiny", max_positions=LIMITS.max_seq_len)
    return EagerEngine(model, LIMITS, kv_dtype=torch.bfloat16, state_dtype=torch.float32)


@pytest.fixture(scope="module")
def trained(few_recall_texts) -> Quality:
    return measure_quality(engine(), manifest(), JET_TINY_DIR, TEXT)


def test_an_engine_equals_its_own_checkpoint(trained) -> None:
    assert trained.kl == 0 and trained.top1 == 1 and not trained.failures()
    assert trained.bits_per_byte["engine"] == trained.bits_per_byte["unquantised"] < 1.5
    for distances in trained.recall.values():
        assert distances["engine"] == distances["unquantised"] > 0.9 and distances["queries"] > 0


def test_a_damaged_engine_is_worse(trained) -> None:
    bad = engine()
    for i, layer in enumerate(bad.model.layers):
        if layer.kind == "attn":
            bad.model.get_parameter(f"layers.{i}.self_attn.qkv_proj.weight").zero_()
    q = measure_quality(bad, manifest(), JET_TINY_DIR, TEXT)
    assert q.bits_per_byte["engine"] > trained.bits_per_byte["engine"] + 0.01
    assert q.kl is not None and q.kl > 1e-3 and q.top1 is not None and q.top1 < 1
    assert q.recall["129-512"]["engine"] < q.recall["129-512"]["unquantised"]


def test_bits_per_byte_is_that_of_one_call() -> None:
    """For a text of one window, it is the mean over one forward pass."""
    e, text = engine(), TEXT[:600]
    q = measure_quality(e, manifest("random weights, seed 0"), JET_TINY_DIR, text)
    ids = torch.tensor([[0, *Tokenizer.from_file(str(JET_TINY_DIR / "tokenizer.json")).encode(text).ids]])
    loss = torch.nn.functional.cross_entropy(e.model(ids[:, :-1])[0].float(), ids[0, 1:], reduction="sum").item()
    assert list(q.bits_per_byte) == ["engine"] and q.kl is None
    assert q.bits_per_byte["engine"] == pytest.approx(loss / math.log(2) / len(text.encode()), rel=2e-3)


@pytest.mark.parametrize("n", [2, 9, 10, 11, 16, 57])
def test_windows_score_every_token_once(n) -> None:
    ids = list(range(n))
    scored = [t for tokens, skip in windows(ids, 10) for t in tokens[1 + skip :]]
    assert scored == ids[1:]
    assert all(len(tokens) <= 11 for tokens, _ in windows(ids, 10))


def test_queries_are_found_with_their_distances() -> None:
    tokenizer = Tokenizer.from_file(str(JET_TINY_DIR / "tokenizer.json"))
    ids, queries = read_queries(tokenizer, "import os\nK72=9183\nx = 1\nK72?9183\nA11?0000\n")
    assert len(queries) == 1  # A11 was never defined
    (q,) = queries
    assert tokenizer.decode([ids[p] for p in q.positions]) == "9183"
    assert tokenizer.decode([ids[q.positions[0] - 1]]) == "?"
    assert tokenizer.decode([ids[q.positions[0] - 1 - q.distance]]) == "="


def test_recall_file_has_queries_near_and_far() -> None:
    tokenizer = Tokenizer.from_file(str(JET_TINY_DIR / "tokenizer.json"))
    lines = RECALL.read_text().splitlines()
    import json

    distances = [q.distance for line in lines for q in read_queries(tokenizer, json.loads(line)["text"])[1]]
    assert len(distances) > 100 and min(distances) < 64 and max(distances) > 1024


def test_random_weights_have_no_checkpoint() -> None:
    assert unquantised_engine(manifest("random weights, seed 0")) is None


def test_a_changed_checkpoint_is_not_compared() -> None:
    other = manifest()
    other.build["inputs"]["weights"] = {"model.safetensors": "0" * 64}
    assert unquantised_engine(other) is None


def test_figures_that_are_not_finite_fail() -> None:
    assert Quality(1, 1, {"engine": math.nan}).failures() == ["held-out text: bits per byte (engine) is nan"]
