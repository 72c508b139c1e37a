"""Engines on a GPU: a build verifies its own engine, and what it generates is the PyTorch model's.

Needs a GPU, and a TensorRT that runs on it: `tensorrt` on any, `tensorrt-rtx` on SM 8.x and 12.x.
"""

import pytest
import torch

from jet_export.backends.eager import load_eager
from jet_export.backends.tensorrt.flavors import FLAVORS
from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import Manifest
from jet_export.plugins.headers import headers_for
from jet_export.runtime.llm import LLM
from jet_export.utils.errors import JetExportError

pytestmark = pytest.mark.gpu
PROMPTS = ["def mean(values):\n    ", "import os\n", "class "]


@pytest.fixture(scope="module", params=list(FLAVORS))
def backend(request) -> str:
    flavor = FLAVORS[request.param]
    major, minor = torch.cuda.get_device_capability()
    if flavor.version() is None:
        pytest.skip(f"{flavor.backend} is not installed")
    if flavor.sms and 10 * major + minor not in flavor.sms:
        pytest.skip(f"{flavor.title} has no engines for SM {major}.{minor}")
    try:
        headers_for(None, fetch=True)
    except JetExportError as e:
        pytest.skip(f"no TensorRT headers: {e}")
    return flavor.backend


@pytest.fixture(scope="module", params=[False, True], ids=["bf16", "fp8"])
def bundle(backend, request, tmp_path_factory):
    if request.param and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs SM 8.9")
    output = tmp_path_factory.mktemp("trt") / "bundle"
    o = BuildOptions(
        model="jet-tiny",
        backend=backend,
        fp8=request.param,
        fetch_headers=True,
        max_seq_len=1024,
        output=output,
        kv_cache_dtype="fp8" if request.param else "auto",
    )
    run_build(make_plan(o), ["jet-export", "build"])
    return output


def test_the_build_verified_it(bundle) -> None:
    verified = Manifest.load(bundle).build["verified"]
    assert verified["passed"] and verified["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_first_tokens_are_the_models(bundle, cuda_graphs) -> None:
    """Later tokens may differ where two logits are a rounding apart; verify bounds the logits."""
    ours = LLM(bundle, cuda_graphs=cuda_graphs)
    theirs = LLM.over(load_eager(bundle, ours.manifest), ours.tokenizer, ours.eos, cuda_graphs=False)
    a, b = (x.generate(PROMPTS, max_new_tokens=1) for x in (ours, theirs))
    assert [c.token_ids for c in a] == [c.token_ids for c in b]


def test_graphs_change_no_bit_and_several_engines_live_together(bundle) -> None:
    llms = [LLM(bundle, cuda_graphs=graphs) for graphs in (True, False)]
    logits = [llm.generate(PROMPTS, max_new_tokens=8, return_logits=True, ignore_eos=True) for llm in llms]
    for p, q in zip(*logits, strict=True):
        assert p.token_ids == q.token_ids and torch.equal(p.logits, q.logits)
