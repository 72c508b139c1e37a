"""A bundle's engine compared with the eager model of the same weights, one test per stage; any backend and device."""

import math

import pytest
import torch

from jet_export.bundle.manifest import Manifest
from jet_export.verify import quality
from jet_export.verify.parity import StageResult
from jet_export.verify.quality import Quality
from jet_export.verify.verify import STAGES, Verification, verify_bundle


@pytest.fixture(scope="module")
def verification(bundle, request, tmp_path_factory) -> Verification:
    """Of `--bundle` all of both texts; of the one built here a quarter of the first, and one of those for recall."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("bundle", default=None) is None:
            recall = tmp_path_factory.mktemp("recall") / quality.RECALL.name
            recall.write_text(quality.RECALL.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
            patch.setattr(quality, "RECALL", recall)
            patch.setattr(quality, "SLICE_BYTES", quality.SLICE_BYTES // 4)
        return verify_bundle(bundle, None, 0, print)


def stage(v: Verification, name: str) -> StageResult:
    return next(s for s in v.stages if s.name == name)


@pytest.mark.parametrize("name", STAGES)
def test_engine_equals_eager_model(verification, name) -> None:
    result = stage(verification, name)
    assert not result.failures, "\n".join(result.failures)


@pytest.mark.gpu
def test_cuda_graph_decode_equals_plain_decode(request) -> None:
    given = request.config.getoption("bundle", default=None)
    if given is None or Manifest.load(given).device.type == "cpu":  # asked first: the bundle built here is for a CPU
        pytest.skip("needs --bundle with one for a GPU; on a CPU nothing is captured")
    verification = request.getfixturevalue("verification")
    assert not stage(verification, "decode by CUDA graph").failures


def test_every_layer_was_compared(verification) -> None:
    layers = {int(m.what.split(".")[1]) for m in stage(verification, "one decode step").measures if m.what != "logits"}
    assert layers == set(range(len(layers)))


def test_quality_on_held_out_text(verification) -> None:
    q = verification.quality
    if q is None:
        pytest.skip("the bundle has random weights or no tokenizer: nothing to read text with")
    assert isinstance(q, Quality)
    assert not q.failures() and all(math.isfinite(b) for b in q.bits_per_byte.values())
    if "unquantised" in q.bits_per_byte:
        # KL >= 0, and on the same text no engine that passed parity is far from its own checkpoint
        assert q.kl is not None and q.kl >= 0
        assert q.bits_per_byte["engine"] < q.bits_per_byte["unquantised"] + 0.05


def test_report_is_json(verification) -> None:
    import json

    report = json.loads(json.dumps(verification.to_dict()))
    assert report["passed"] is verification.passed and report["torch"] == torch.__version__
