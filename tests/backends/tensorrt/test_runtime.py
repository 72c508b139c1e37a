"""The TensorRT runtime on a fake: the evaluator, behind the real bindings' signatures and a real plan's profiles."""

import json

import pytest
import torch
from helpers.compare import same_bits
from helpers.fake_tensorrt import FakeTensorRT, Refused
from helpers.rtx_bundles import link_files, needs_rtx, rtx_bundle, run_on_cpu

from jet_export.backends.eager import load_eager
from jet_export.backends.load import load_engine
from jet_export.backends.onnx.engine import OnnxEngine
from jet_export.backends.tensorrt.engine import Context, TensorRTEngine
from jet_export.backends.tensorrt.flavors import FLAVORS, Flavor
from jet_export.bundle.manifest import Manifest
from jet_export.model.cache import PackedBatch
from jet_export.runtime.llm import LLM
from jet_export.runtime.runner import Runner
from jet_export.utils.errors import JetExportError
from jet_export.verify.verify import STAGES, verify_engines

pytestmark = needs_rtx
BUNDLES = {"bf16": "jet-tiny bf16", "fp8": "jet-tiny fp8, 3 layers"}


@pytest.fixture(scope="module", params=["bf16"])
def bundle(request, tmp_path_factory):
    built = rtx_bundle(tmp_path_factory, BUNDLES[request.param])
    return run_on_cpu(built, tmp_path_factory.mktemp("fake") / "bundle")


@pytest.fixture
def fake(bundle, monkeypatch) -> FakeTensorRT:
    trt = FakeTensorRT(FLAVORS["tensorrt-rtx"].load(), bundle)
    monkeypatch.setattr(Flavor, "load", lambda self: trt)
    return trt


both = pytest.mark.parametrize("bundle", ["bf16", "fp8"], indirect=True)


def failures(engine, bundle) -> list[str]:
    """The failures of the first stage that has any."""
    stages = verify_engines(engine, load_eager(bundle, Manifest.load(bundle)))
    return next((s.failures for s in stages if s.failures), [])


def test_verifies(fake, bundle) -> None:
    engine, manifest = load_engine(bundle)
    assert isinstance(engine, TensorRTEngine)
    stages = list(verify_engines(engine, load_eager(bundle, manifest)))
    assert not [f for s in stages for f in s.failures] and [s.name for s in stages] == list(STAGES)


@both
def test_generates_as_the_graph_and_the_model_do(fake, bundle) -> None:
    """In FP8 the graph, evaluated literally, may choose another token than the model."""
    llm = LLM(bundle)
    prompts = [[5, 7, 11, 2], list(range(90)), [3]]
    others = [OnnxEngine.open(bundle, llm.manifest, {}), load_eager(bundle, llm.manifest)]
    llms = [llm, *(LLM.over(engine, llm.tokenizer, llm.eos) for engine in others)]
    tokens = [[c.token_ids for c in x.generate(prompts, max_new_tokens=4, ignore_eos=True)] for x in llms]
    assert tokens[0] == tokens[1]
    assert llm.manifest.quantization or tokens[0] == tokens[2]


def test_a_state_has_one_address(fake, bundle) -> None:
    engine, _ = load_engine(bundle)
    runner = Runner(engine)
    runner.prefill([0, 1], [[1, 2, 3], [4]])
    runner.decode([0, 1], torch.tensor([5, 6]))
    for context in fake.contexts:
        for spec, pool in zip(engine.specs, runner.states, strict=True):
            assert context.addresses[spec.name] == context.addresses[f"{spec.name}_out"] == pool.data_ptr()
    assert [c.profile for c in fake.contexts] == [0, 1]


@pytest.mark.parametrize("bundle", ["fp8"], indirect=True)
def test_drafts_are_verified_by_an_engine_of_their_own(fake, bundle) -> None:
    """Over the same states: new sequences, then a call that takes a token of each back."""
    engine, manifest = load_engine(bundle)
    assert isinstance(engine, TensorRTEngine)
    assert [c.name for c in engine.contexts] == ["prefill", "decode", "verify"] and engine.rollback == 2
    found = []
    for e in (engine, OnnxEngine.open(bundle, manifest, {})):
        states, ids = Runner(e).states, torch.tensor([5, 7, 11, 2])
        calls = batch(e)._replace(cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32))
        logits = [e.verify(ids, calls, states)]
        logits.append(e.verify(ids + 1, calls._replace(context_lens=calls.context_lens + 1), states))
        found.append([*logits, *states])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].shape == (4, engine.config.vocab_size)
    with pytest.raises(JetExportError, match=r"verify: input_ids has shape \[99\], the engine takes \[1\] to"):
        engine.verify(torch.zeros(99, dtype=torch.int64), batch(engine), Runner(engine).states)


def test_both_tensorrts_run_the_same_code(fake, bundle) -> None:
    """They differ in how a context is created: RTX is told when to specialise kernels for the shapes that it sees."""
    m, logits = Manifest.load(bundle), []
    for flavor in FLAVORS.values():
        runner = Runner(TensorRTEngine(fake, flavor, bundle, m))
        logits.append([runner.prefill([0], [[1, 2, 3]]), runner.decode([0], torch.tensor([4]))])
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
    strategy = fake.ExecutionContextAllocationStrategy.USER_MANAGED
    kinds = fake.DynamicShapesKernelSpecializationStrategy
    assert [c.how for c in fake.contexts[:2]] == [strategy] * 2  # TensorRT
    configs = [c.how.parts[2] for c in fake.contexts[2:]]
    assert [c.strategy for c in configs] == [strategy] * 2
    assert [c.dynamic_shapes_kernel_specialization_strategy for c in configs] == [kinds.NONE, kinds.EAGER]


class Faulty(TensorRTEngine):
    """Binds something else."""

    def _bind(self, c: Context, name: str, tensor: torch.Tensor, shape: bool = True) -> None:
        super()._bind(c, *self.instead(name, tensor), shape)

    def instead(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        raise NotImplementedError


class SwappedStates(Faulty):
    def instead(self, name, tensor):
        swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
        return (swap[name[:9]] + name[9:] if name[:9] in swap else name), tensor


class StaleContextLens(Faulty):
    """Reads the lengths of the first call with as many sequences."""

    def instead(self, name, tensor):
        kept = self.__dict__.setdefault("kept", {})
        if name == "context_lens":
            tensor = kept.setdefault(len(tensor), tensor.clone())
        return name, tensor


class TransposedStride(TensorRTEngine):
    """A state in a memory layout that the engine does not expect."""

    def _run(self, profile, inputs):
        real = inputs["layers.0.recurrent_state"]
        inputs = {**inputs, "layers.0.recurrent_state": real.transpose(2, 3).contiguous()}
        logits = super()._run(profile, inputs)
        real.copy_(inputs["layers.0.recurrent_state"].transpose(2, 3))
        return logits


def faulty(kind: type[TensorRTEngine], bundle) -> TensorRTEngine:
    flavor = FLAVORS["tensorrt-rtx"]
    return kind(flavor.load(), flavor, bundle, Manifest.load(bundle))


@pytest.mark.parametrize("kind", [SwappedStates, StaleContextLens])
def test_verify_notices(fake, bundle, kind) -> None:
    assert failures(faulty(kind, bundle), bundle)


def test_verify_notices_a_transposed_state(fake, bundle) -> None:
    """Prefill leaves the state as it is; decode reads it transposed."""

    class Lost(TransposedStride):
        def _run(self, profile, inputs):
            return TensorRTEngine._run(self, profile, inputs) if profile == 0 else super()._run(profile, inputs)

    assert failures(faulty(Lost, bundle), bundle)


def test_wrong_profile(fake, bundle) -> None:
    engine = faulty(TensorRTEngine, bundle)
    engine.contexts = [engine.contexts[1], engine.contexts[0]]
    with pytest.raises(
        JetExportError, match=r"decode: input_ids has shape \[5\], the engine takes \[1\] to \[4\].\n.*larg"
    ):
        Runner(engine).prefill([0], [[1, 2, 3, 4, 5]])


def batch(engine, n: int = 2) -> PackedBatch:
    zeros = torch.zeros(n, dtype=torch.int32)
    return PackedBatch(
        torch.arange(n + 1, dtype=torch.int32),
        torch.arange(n, dtype=torch.int32),
        zeros,
        zeros[:, None],
        zeros[:, None],
    )


def test_calls_that_do_not_fit(fake, bundle) -> None:
    engine, _ = load_engine(bundle)
    states = Runner(engine).states
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(JetExportError, match=r"decode: block_table has shape \[2, 99\], the engine takes \[1, 1\] to"):
        engine.decode(ids, batch(engine)._replace(block_table=torch.zeros(2, 99, dtype=torch.int32)), states)
    pool = torch.zeros(6, states[0].shape[2], states[0].shape[1], dtype=states[0].dtype).transpose(1, 2)
    with pytest.raises(JetExportError, match=r"decode: layers\.0\.conv_state is not contiguous"):
        engine.decode(ids, batch(engine), [pool, *states[1:]])
    wide = batch(engine)._replace(slots=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(JetExportError, match=r"decode: slots is torch.int64, the engine takes torch.int32"):
        engine.decode(ids, wide, states)
    short = batch(engine)._replace(context_lens=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(
        JetExportError, match=r"decode: TensorRT for RTX could not run a step of 2 tokens of 2 seq.*conte"
    ):
        engine.decode(ids, short, states)
    assert engine.decode(ids, batch(engine), states).shape == (2, engine.config.vocab_size)  # and goes on


def test_library_in_the_plan_or_beside_it(fake, bundle, tmp_path) -> None:
    """A plan without the library uses the bundle's; another file in its place does not load."""
    m = Manifest.load(bundle)
    m.backend["library_in_plan"] = False
    flavor = FLAVORS["tensorrt-rtx"]
    assert TensorRTEngine(fake, flavor, bundle, m).runtimes[0].engine_host_code_allowed is False
    link_files(bundle, tmp_path)
    (tmp_path / "libjet_plugins.so").unlink()
    (tmp_path / "libjet_plugins.so").write_bytes(b"\x7fELF")
    with pytest.raises(
        JetExportError, match=r"libjet_plugins.so: TensorRT could not load the plugin library: .*cannot be"
    ):
        TensorRTEngine(fake, flavor, tmp_path, m)


@pytest.mark.parametrize("name", ["libjet_plugins.so", "engine.plan"])
def test_altered_or_missing_files_are_refused_before_they_are_loaded(fake, bundle, tmp_path, name) -> None:
    link_files(bundle, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(JetExportError, match=rf"{name} is missing.\nBuild it again here: jet-export build .* --force"):
        LLM(tmp_path)
    (tmp_path / name).write_bytes((bundle / name).read_bytes()[:-1] + b"x")
    with pytest.raises(JetExportError, match=rf"{name} has changed since it was built"):
        LLM(tmp_path)
    assert not fake.contexts


def test_another_version_is_refused(bundle, tmp_path, monkeypatch) -> None:
    link_files(bundle, tmp_path)
    values = json.loads((bundle / "manifest.json").read_text())
    values["backend"]["tensorrt-rtx"] = "1.6.0.9"
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    again = r"Build it again here: jet-export build --model jet-tiny|Build it again here: jet-export build --model /"
    with pytest.raises(JetExportError, match=rf"built with TensorRT for RTX 1.6.0.9, this is 1\.7.*\n({again})") as e:
        LLM(tmp_path)
    assert "pip install tensorrt-rtx==1.6.0.9" in str(e.value)
    monkeypatch.setattr(Flavor, "version", lambda self: None)
    with pytest.raises(JetExportError, match=r"needs TensorRT for RTX, which is not installed.\npip install"):
        LLM(bundle)


def test_of_another_gpu(tmp_path_factory) -> None:
    built = rtx_bundle(tmp_path_factory, "jet-tiny bf16")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(JetExportError, match=r"built for a CUDA GPU \(sm_89\+sm_120\), and torch sees none"):
        LLM(built)


@pytest.mark.parametrize(
    "call",
    [
        lambda context: context.execute_async_v2(0),
        lambda context: context.execute_async_v3("0"),
        lambda context: context.execute_async_v3(),
        lambda context: context.set_input_shape("slots", torch.Size([1])),
        lambda context: context.set_tensor_address("slots", torch.zeros(1)),
        lambda context: context.set_tensor_address(name="slots", address=16),
        lambda context: setattr(context, "profile", 1),
    ],
)
def test_the_fake_refuses_what_the_bindings_lack(fake, bundle, call) -> None:
    engine, _ = load_engine(bundle)
    assert isinstance(engine, TensorRTEngine)
    with pytest.raises(Refused):
        call(engine.contexts[0].context)


@pytest.mark.parametrize("library_in_plan", [True, False])
def test_the_real_bindings_up_to_the_gpu(tmp_path_factory, library_in_plan) -> None:
    """Logger, registry, library and mapped plan go to TensorRT for RTX itself, which then finds no driver."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    bundle = rtx_bundle(tmp_path_factory, "jet-tiny bf16")
    m, flavor = Manifest.load(bundle), FLAVORS["tensorrt-rtx"]
    m.backend["library_in_plan"] = library_in_plan
    with pytest.raises(JetExportError, match=r"engine.plan: TensorRT for RTX could not load the engine: .*CUDA driver"):
        TensorRTEngine(flavor.load(), flavor, bundle, m, torch.device("cpu"))
