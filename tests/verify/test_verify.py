"""verify passes engines that only round differently, and names the stage and layer of every seeded fault."""

import json
import math
from datetime import date

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.faults import (
    FAULTS,
    FaultyEngine,
    SplitProducts,
    StateNotCarried,
    fast_accumulation,
    k_scale_off,
    keys_scaled,
    other_rounding,
)
from helpers.fp8_models import to_fp8
from helpers.short_tiny import short_tiny
from safetensors.torch import save_file
from typer.testing import CliRunner

from jet_export.backends.eager import EagerEngine, load_eager
from jet_export.bundle.dtypes import dtype_name
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import WEIGHTS, Manifest, describe_files
from jet_export.bundle.target import host_target
from jet_export.cli.app import app
from jet_export.model.fp8 import FP8, Fp8Linear
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.quantization.calibrate import calibrate_kv_scales
from jet_export.utils.environment import source_commit
from jet_export.utils.errors import JetExportError
from jet_export.verify import verify
from jet_export.verify.parity import measure, reference_engine
from jet_export.verify.trial import Layout, Trial, chunk_sizes, random_prompts, scenarios
from jet_export.verify.verify import Verification, verify_engines

LIMITS = Limits(max_batch_size=4, max_seq_len=1024, prefill_chunk=512)


def failures(engine, eager, seed: int = 0) -> list[str]:
    """The failures of the first stage that has any; where there are none, all stages have run."""
    return next((s.failures for s in verify_engines(engine, eager, seed=seed) if s.failures), [])


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def tiny(request) -> EagerEngine:
    """A trained layer of each kind; in FP8 with an FP8 KV cache too."""
    model = short_tiny(LIMITS.max_seq_len)
    kv = torch.bfloat16
    if request.param == "fp8":
        ids = torch.randint(4096, (2, 300), generator=torch.Generator().manual_seed(1))
        to_fp8(model, ids)
        calibrate_kv_scales(model, [ids])
        kv = FP8
    return EagerEngine(model, LIMITS, kv_dtype=kv, state_dtype=torch.float32)


@pytest.fixture(scope="module")
def mini() -> EagerEngine:
    model = random_model(mini_config(), torch.float32, max_positions=LIMITS.max_seq_len)
    return EagerEngine(model, LIMITS, kv_dtype=torch.float32, state_dtype=torch.float32)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(tiny, name) -> None:
    assert failures(FAULTS[name](tiny), tiny)


def test_wrong_key_scale_is_noticed(tiny) -> None:
    """An FP8 cache's scale off by two; without one, keys 3 % too large."""
    fault = k_scale_off if FP8 in {s.dtype for s in tiny.specs} else keys_scaled
    found = failures(fault(tiny), tiny)
    attn = tiny.config.layer_types.index("attn")
    assert any(f"layers.{attn}.k" in f for f in found)


def assert_passes_with_other_rounding(eager: EagerEngine) -> None:
    """The MLP fused, and products summed in another order."""
    stages = list(verify_engines(other_rounding(eager), eager))
    assert not [f for s in stages for f in s.failures]
    assert [s.name for s in stages] == list(verify.STAGES)
    assert all(max(m.max_abs for m in s.measures) > 0 for s in stages if s.measures)


def test_other_rounding_passes(tiny) -> None:
    assert_passes_with_other_rounding(tiny)


def test_other_rounding_passes_in_seven_layers() -> None:
    """All of jet-tiny in bf16; test_parity has it compiled, in FP8."""
    model = JetNemotronForCausalLM.from_pretrained("jet-tiny", max_positions=LIMITS.max_seq_len)
    assert_passes_with_other_rounding(EagerEngine(model, LIMITS, kv_dtype=torch.bfloat16, state_dtype=torch.float32))


@pytest.mark.parametrize("tiny", ["fp8"], indirect=True)
def test_fast_accumulation_passes_and_fewer_bits_do_not(tiny) -> None:
    """The bounds know nothing of it: they are those of an engine that sums in fp32."""
    eager = EagerEngine(tiny.model, Limits(max_batch_size=4, max_seq_len=96, prefill_chunk=48), kv_dtype=FP8)
    assert not failures(fast_accumulation(eager, 13), eager)
    assert failures(fast_accumulation(eager, 7), eager)


def test_other_rounding_passes_in_fp32(mini) -> None:
    engine = other_rounding(mini)
    assert isinstance(engine.model.get_submodule("layers.0.mlp.down_proj"), SplitProducts)
    assert not failures(engine, mini)


@pytest.mark.parametrize("name", ["window one too long", "window one too short", "RoPE position off by one"])
def test_faults_are_noticed_in_fp32(mini, name) -> None:
    assert failures(FAULTS[name](mini), mini)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_batch_size=1, max_seq_len=32, prefill_chunk=8),
        Limits(max_batch_size=2, max_seq_len=50, prefill_chunk=1),
        Limits(max_batch_size=16, max_seq_len=200, prefill_chunk=200),
    ],
)
def test_any_limits(mini, limits) -> None:
    eager = EagerEngine(mini.model, limits, kv_dtype=torch.float32, state_dtype=torch.float32)
    assert not failures(other_rounding(eager), eager)
    assert failures(StateNotCarried(eager), eager)
    for s in scenarios(eager.config, limits):
        assert s.tokens <= limits.max_seq_len and s.longest_call <= limits.prefill_chunk


def test_too_short_to_verify(mini) -> None:
    with pytest.raises(JetExportError, match=r"max_seq_len 20 is too short.*\n?.*--max-seq-len 32"):
        scenarios(mini.config, Limits(max_batch_size=1, max_seq_len=20, prefill_chunk=20))


def test_scenarios_cross_what_they_should() -> None:
    """Chunks of 1, 2 and 3 tokens; the window's edge, pages, and the end of the ring."""
    config = JetNemotronForCausalLM.from_pretrained("jet-tiny").config
    chunked = scenarios(config, Limits(max_batch_size=8, max_seq_len=2048, prefill_chunk=2048))[1]
    assert {1, 2, 3} <= set(chunked.stages[0].calls[i].lens[0] for i in range(len(chunked.stages[0].calls)))
    layout = Layout(
        config, tokens=chunked.tokens, longest_call=chunked.longest_call, seed=0, device=torch.device("cpu")
    )
    assert chunked.tokens > layout.tables["window_pages"].shape[1] * 128 > config.window_size
    assert sum(chunk_sizes(1000, 60)) == 1000 and max(chunk_sizes(1000, 60)) == 60


def test_zeroed_states_move_the_logits_beyond_the_bound() -> None:
    """With random weights too: the published initialisation of A_log and dt_bias makes the states matter."""
    model = random_model(short_tiny(LIMITS.max_seq_len).config, max_positions=LIMITS.max_seq_len)
    eager = EagerEngine(model, LIMITS, kv_dtype=torch.bfloat16, state_dtype=torch.float32)
    for s in verify_engines(StateNotCarried(eager), eager):
        if s.name in ("chunked prefill", "ragged batch", "decode", "one decode step", "one prefill step"):
            logits = s.measures[0]
            assert logits.what == "logits" and logits.relative > 2 * logits.relative_bound


def test_a_write_to_an_unused_row_is_noticed(mini) -> None:
    class Spills(FaultyEngine):
        def decode(self, input_ids, batch, states):
            logits = super().decode(input_ids, batch, states)
            for pool in states:
                pool[-1] += 1e-3
                pool[0] += 1e-3
            return logits

    class WritesPadding(FaultyEngine):
        def prefill(self, input_ids, batch, logit_indices, states):
            batch = batch._replace(slots=torch.where(batch.slots < 0, 0, batch.slots))
            return super().prefill(input_ids, batch, logit_indices, states)

    assert failures(Spills(mini), mini)
    assert failures(WritesPadding(mini), mini)


def test_a_nondeterministic_step_is_noticed(mini) -> None:
    class Noisy(FaultyEngine):
        def decode(self, input_ids, batch, states):
            logits = super().decode(input_ids, batch, states)
            return logits * (1 + 1e-7 * torch.randn_like(logits))

    assert any("the same step twice" in f for f in failures(Noisy(mini), mini))


def test_nan_fails() -> None:
    a = torch.randn(4, 8)
    bad = a.clone()
    bad[2, 3] = math.nan
    m = measure("decode", "layers.1.k", [bad, a, a + 1e-3], 1e-3, 1e-3)
    assert len(m.failures()) == 2 and math.isnan(m.ratio)
    assert m.failures()[0].startswith("decode: layers.1.k: relative error nan, bound 0.00")


def test_reference_keeps_fp8_and_shares_its_codes(tiny) -> None:
    reference = reference_engine(tiny)
    assert reference.dtype == torch.float32
    for name, module in reference.model.named_modules():
        twin = tiny.model.get_submodule(name)
        if isinstance(module, Fp8Linear):
            assert module.weight is twin.weight
            assert module.bias is None or module.bias.dtype == torch.float32
    assert reference.model.lm_head.weight is reference.model.embed_tokens.weight


def test_empty_sequences_start_from_zero_in_noisy_pools(mini) -> None:
    """A trial equals the batch API, whose pools are zero."""
    scenario = scenarios(mini.config, LIMITS)[0]
    prompts = random_prompts(mini.config, scenario.tokens, 0)
    layout = Layout(
        mini.config, tokens=scenario.tokens, longest_call=scenario.longest_call, seed=3, device=torch.device("cpu")
    )
    trial = Trial(mini, layout, prompts)
    call = scenario.stages[0].calls[0]
    logits = trial.step(call)
    expected = mini.model(torch.tensor([prompts[0][: call.lens[0]]]))[0]
    torch.testing.assert_close(logits[-1], expected[-1])


# Through the command line: a bundle directory without packages, its engine replaced by an eager one.


@pytest.fixture(scope="module")
def directory(mini, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle")
    tensors = {k: v for k, v in mini.model.state_dict().items() if k != "lm_head.weight"}
    save_file({**tensors, "cos_sin": mini.model.cos_sin}, path / WEIGHTS)
    model = {"name": "mini", "source": "random weights, seed 0", "licence": None, "config": mini.config.to_dict()}
    dtype = dtype_name(torch.float32)
    manifest = Manifest(
        model=model,
        backend={"name": "inductor"},
        target=host_target(torch.device("cpu")),
        dtype=dtype,
        kv_cache_dtype=dtype,
        state_dtype=dtype,
        limits=LIMITS,
    )
    manifest.files = describe_files(path)
    manifest.save(path)
    return path


@pytest.mark.parametrize("fault", [None, "state not carried", "window one too long"])
def test_command_line(directory, monkeypatch, tmp_path, fault) -> None:
    def load_engine(bundle, check=True):
        manifest = Manifest.load(bundle)
        eager = load_eager(bundle, manifest)
        return (FAULTS[fault] if fault else FaultyEngine)(eager), manifest

    monkeypatch.setattr(verify, "load_engine", load_engine)
    done = CliRunner().invoke(app, ["verify", str(directory), "--json", str(tmp_path / "v.json")])
    assert done.exit_code == (1 if fault else 0)
    assert done.stdout.rstrip().endswith("FAILED" if fault else "PASSED")
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["passed"] is (fault is None)
    assert len(report["stages"]) == len(verify.STAGES)
    assert {"gpu", "driver", "torch", "triton", "python"} <= report["environment"].keys()
    assert report["environment"]["commit"] == source_commit()
    assert date.fromisoformat(report["environment"]["date"]) <= date.today()
    if fault == "state not carried":
        assert "chunked prefill: layers.0.recurrent_state: relative error" in done.stdout


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), (b"\xff\xfe", "not UTF-8")])
def test_bad_text(directory, tmp_path, content, message) -> None:
    path = tmp_path / "text.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises(JetExportError, match=message):
        verify.verify_bundle(directory, path, 0, print)


def test_failures_are_reported(mini) -> None:
    v = Verification("somewhere", list(verify_engines(FAULTS["conv state shifted"](mini), mini)))
    report = json.loads(json.dumps(v.to_dict()))
    assert not v.passed and report["failures"] == v.failures()
    assert any(f.startswith("one decode step: layers.0.conv_state: ") for f in v.failures())
    assert all(s["measures"] for s in report["stages"] if s["stage"] != verify.PROBES)
