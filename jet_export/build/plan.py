"""What a build will do, decided before any work: `make_plan(BuildOptions(...))`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from jet_export.backends.tensorrt.flavors import FLAVORS
from jet_export.build.backend_choice import BackendChoice, choose_backend
from jet_export.build.mtp import check_mtp
from jet_export.build.state_interval import Interval, check_states, table_interval
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import Memory, engine_memory, predictor_bytes, weight_bytes
from jet_export.bundle.target import has_dependent_launch, host_target, target_device
from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8_checkpoint import is_fp8_checkpoint
from jet_export.model.hf_files import TOKENIZER, tokenizer_directory
from jet_export.model.hub import PRESETS, hub_config, hub_id_of, load_config, local_directory
from jet_export.model.weights import CheckpointFiles, check_tensors
from jet_export.plugins.targets import check_fp8, parse_sms, sm_name, sm_of_arch
from jet_export.runtime.tokenizer import Tokenizer
from jet_export.utils.errors import JetExportError

DEFAULT_MAX_SEQ_LEN = 4096
DEFAULT_PREFILL_CHUNK = 2048
PLUGIN_BACKENDS = tuple(FLAVORS)
FAST_ACCUMULATION_SMS = (89, 90)  # Ada and Hopper, where cuBLAS says that it has an effect


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the user asked for; the command line's options, one to one."""

    model: str
    checkpoint: Path | None = None
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "bfloat16"
    fp8: bool = False
    fp8_lm_head: bool = False
    fast_accumulation: bool = False  # of FP8 products, see model/fp8.py
    keep: tuple[str, ...] = ()
    calibration: Path | None = None
    kv_cache_dtype: str = "auto"  # the model dtype
    state_dtype: str = "float32"
    state_interval: int | None = 1  # recurrent states are written every so many tokens; None: as the table says
    speculate: int = 0  # the most drafts that a step verifies; 0: no package for it
    mtp: bool = False  # with the checkpoint's multi-token-prediction layer, which drafts them
    max_batch_size: int = 8
    max_seq_len: int | None = None
    prefill_chunk: int | None = None
    random_weights: bool = False
    tokenizer: Path | None = None  # of random weights: a directory with tokenizer.json
    seed: int = 0
    output: Path | None = None
    force: bool = False
    sm: str | None = None  # "8.9,9.0": architectures of the plugin library's kernels; default the build's target
    tensorrt_headers: Path | None = None
    fetch_headers: bool = False
    keep_onnx: bool = False
    decode_one: bool = True  # on a GPU: a separate package to decode one sequence
    fuse_decode: bool = False  # from SM 9.0 on: fused kernels for one sequence, launched by programmatic edges


@dataclass(kw_only=True)
class BuildPlan:
    """Everything decided before any work. It is printed first; `--dry-run` stops there."""

    options: BuildOptions
    config: JetNemotronConfig
    backend: BackendChoice
    target: dict[str, Any]
    dtypes: Dtypes
    interval: Interval  # of dtypes
    limits: Limits
    source: str  # where the weights come from, in words
    directory: Path | None  # the checkpoint's, where it is local
    output: Path
    fp8: bool  # asked for, or the checkpoint's
    memory: Memory
    download_bytes: int
    disk_bytes: int
    build_memory: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    sms: tuple[int, ...] = ()  # of the plugin library; empty for a backend without one
    build_device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where the model is loaded


def make_plan(options: BuildOptions) -> BuildPlan:
    """Check every option and decide the rest. Raises JetExportError. Writes nothing, and downloads at most the
    config.json of an OWNER/NAME that is no preset."""
    device = target_device(options.device)
    target = host_target(device)
    backend = choose_backend(options.backend, target["arch"])
    if backend.name == "onnx":
        target.pop("isa", None)  # nothing is compiled
    if options.fuse_decode and (backend.name != "inductor" or not has_dependent_launch(target)):
        raise JetExportError(
            f"--fuse-decode: not for {backend.name} on {target['arch']}.",
            "It needs --backend inductor and SM 9.0 or newer.",
        )
    check_states(options.state_interval or 1, options.speculate)
    dtypes = _dtypes(options)
    if backend.name in FLAVORS and FLAVORS[backend.name].needs_gpu and device.type != "cuda":
        raise JetExportError(
            f"--backend {backend.name}: builds on the GPU that the engine is for, and this build has none.",
            "Build on that machine; without a GPU there are --backend tensorrt-rtx --sm 8.9 and --backend onnx.",
        )
    sms = plugin_sms(options, backend.name, target["arch"])
    if sms:
        target = tensorrt_target(target, backend.name, sms)
    directory = options.checkpoint or local_directory(options.model)
    if options.checkpoint is not None and not options.checkpoint.is_dir():
        raise JetExportError(f"--checkpoint {options.checkpoint}: no such directory.")
    if options.checkpoint is not None and not (options.checkpoint / "config.json").is_file():
        raise JetExportError(f"--checkpoint {options.checkpoint}: no config.json there.")
    config = _config(options, directory)
    if directory is not None and not options.random_weights:
        check_tensors(CheckpointFiles.open(directory), mtp=options.mtp)
    _check_tokenizer(options, config)
    if options.mtp:
        check_mtp(options.speculate, config, backend.name, None if options.random_weights else directory)
    limits, warnings = _limits(options, config)
    interval = Interval(dtypes.state_interval, "")
    if options.state_interval is None and backend.name == "inductor":
        interval = table_interval(config, dtypes.state, sm_of_arch(target["arch"]), limits.max_batch_size)
        dtypes = replace(dtypes, state_interval=interval.tokens)
    if dtypes.rollback > limits.prefill_chunk:
        raise JetExportError(
            f"--speculate {options.speculate}: a step of {dtypes.rollback} tokens a sequence, and --prefill-chunk is "
            f"{limits.prefill_chunk}.",
            "Windows keep no more tokens than a prefill call takes: raise --prefill-chunk, or verify fewer drafts.",
        )
    fp8 = options.fp8 or (is_fp8_checkpoint(config) and not options.random_weights)
    if fp8 and dtypes.model != torch.bfloat16:
        raise JetExportError(f"{options.model}: an FP8 checkpoint makes a bfloat16 model.", "Leave --dtype out.")
    if fp8 and sms:
        check_fp8(sms, "--fp8")
    elif fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise JetExportError(f"--fp8: {target['arch']} has no FP8 arithmetic.", "FP8 needs SM 8.9 or newer.")
    if options.fast_accumulation:
        warnings += _check_fast_accumulation(backend.name, fp8, target["arch"])
    layer = predictor_bytes(config, dtypes.model) if options.mtp else 0
    weights = weight_bytes(config, dtypes.model, fp8, options.fp8_lm_head) + layer
    full = weight_bytes(config, dtypes.model, False) + layer
    plans = 2 if sms and dtypes.rollback else 1  # of a TensorRT bundle, each with its own copy of the weights
    memory = engine_memory(config, limits, dtypes, plans * weights)
    source = _source(options, directory)
    return BuildPlan(
        options=options,
        config=config,
        backend=backend,
        target=target,
        dtypes=dtypes,
        interval=interval,
        limits=limits,
        source=source,
        directory=directory,
        output=options.output or default_output(options, fp8),
        fp8=fp8,
        memory=memory,
        download_bytes=0 if directory or options.random_weights else full,
        disk_bytes=(1 + plans if sms else 1) * weights + 20_000_000,
        build_memory=max(2 * full, 4 * weights if sms else 0) + 1_500_000_000,
        seconds=expected_seconds(config, full, backend.name),
        warnings=[*warnings, *filter(None, [backend.warning])],
        sms=sms,
        build_device=device,
    )


def _check_fast_accumulation(backend: str, fp8: bool, arch: str) -> list[str]:
    """Raises JetExportError where no FP8 product is the library's. Returns a warning where it has no effect."""
    flag = "--fast-accumulation"
    if backend != "inductor":
        raise JetExportError(
            f"{flag}: the {backend} backend decides by itself how products are summed.",
            "Leave it out, or choose --backend inductor.",
        )
    if not fp8:
        raise JetExportError(f"{flag}: is about FP8 products, and this build has none.", "Add --fp8, or leave it out.")
    works = sm_of_arch(arch) in FAST_ACCUMULATION_SMS
    return [] if works else [f"{flag}: changes nothing on {arch}, only on GPUs of SM 8.9 and 9.0."]


def _check_tokenizer(options: BuildOptions, config: JetNemotronConfig) -> None:
    """Raises JetExportError for a --tokenizer that is none, has ids beyond the vocabulary, or belongs elsewhere."""
    directory = options.tokenizer
    if directory is None:
        return
    if not options.random_weights:
        raise JetExportError("--tokenizer: belongs to --random-weights; a checkpoint has its own.", "Leave it out.")
    path = tokenizer_directory(directory) / TOKENIZER
    if not path.is_file():
        raise JetExportError(f"--tokenizer {directory}: no {TOKENIZER} there.", "Name a directory that has one.")
    largest = Tokenizer(path).largest_id
    if largest >= config.vocab_size:
        raise JetExportError(
            f"--tokenizer {directory}: its ids go up to {largest}, the model's vocabulary has {config.vocab_size}.",
            "Use the tokenizer of this architecture.",
        )


def _source(options: BuildOptions, directory: Path | None) -> str:
    """Where the weights come from, in words. Raises JetExportError for an architecture without any."""
    if options.random_weights:
        return f"random weights, seed {options.seed}"
    if options.model == "jet-tiny" and options.checkpoint is None:
        return "jet-tiny, in the package"
    if directory is not None:
        return str(directory)
    hub_id = hub_id_of(options.model)
    if hub_id is None:
        raise JetExportError(
            f"--model {options.model}: an architecture without weights.",
            "Pass --checkpoint DIR with its weights, or --random-weights.",
        )
    return f"hub {hub_id}"


def plugin_sms(options: BuildOptions, backend: str, arch: str) -> tuple[int, ...]:
    """The SMs of the plugin library: --sm, or this machine's. Raises JetExportError where neither is known, and for
    options that belong to the library without one."""
    if backend not in PLUGIN_BACKENDS:
        given = {
            "--sm": options.sm,
            "--tensorrt-headers": options.tensorrt_headers,
            "--fetch-headers": options.fetch_headers,
            "--keep-onnx": options.keep_onnx,
        }
        for flag, value in given.items():
            if value:
                raise JetExportError(
                    f"{flag}: the {backend} backend has no plugin library.",
                    f"Leave it out, or choose --backend {' or '.join(PLUGIN_BACKENDS)}.",
                )
        return ()
    here = sm_of_arch(arch)
    if options.sm is None and here is None:
        raise JetExportError(
            f"--backend {backend}: no GPU here, so the architecture to build for has to be named.",
            "Pass --sm, e.g. --sm 8.9",
        )
    sms = parse_sms(options.sm if options.sm is not None else sm_name(here or 0))
    if options.fp8 or options.kv_cache_dtype == "fp8":
        check_fp8(sms, "--fp8" if options.fp8 else "--kv-cache-dtype fp8")
    return sms


def tensorrt_target(host: dict[str, Any], backend: str, sms: tuple[int, ...]) -> dict[str, Any]:
    """What an engine for these SMs requires of the machine that runs it; TensorRT's engines run on this GPU only."""
    flavor, here = FLAVORS[backend], sm_of_arch(host["arch"])
    flavor.check_sms(sms)
    if flavor.needs_gpu:
        if here not in sms:
            raise JetExportError(
                f"--sm: leaves out this GPU's {sm_name(here or 0)}, which the engine is built for.",
                "Add it, or leave --sm out.",
            )
        return {**host, "sms": [here]}
    return {"device": "cuda", "arch": "+".join(f"sm_{sm}" for sm in sms), "sms": list(sms)}


def expected_seconds(config: JetNemotronConfig, nbytes: int, backend: str) -> float:
    """An estimate: a share per layer (two Inductor compilations; an ONNX export; that and TensorRT's build), and a few
    passes over the weights."""
    base, a_layer, speed = {"inductor": (25, 2.5, 2e8), "onnx": (5, 0.5, 2e8)}.get(backend, (25, 1.5, 1e8))
    return base + a_layer * config.num_hidden_layers + nbytes / speed


def default_output(options: BuildOptions, fp8: bool) -> Path:
    """bundles/<model>-<precision>-<backend>."""
    name = Path(options.model).name.removesuffix(".json") or "model"
    precision = "fp8" if fp8 else {"bfloat16": "bf16", "float32": "fp32"}[options.dtype]
    backend = "inductor" if options.backend == "auto" else options.backend
    return Path("bundles") / f"{name}-{precision}-{backend}"


def _dtypes(options: BuildOptions) -> Dtypes:
    for flag, value, known in (
        ("--dtype", options.dtype, ("bfloat16", "float32")),
        ("--kv-cache-dtype", options.kv_cache_dtype, ("auto", "bfloat16", "float32", "fp8")),
        ("--state-dtype", options.state_dtype, ("float32", "bfloat16")),
    ):
        if value not in known:
            raise JetExportError(f"{flag} {value}: not known.", f"Known: {', '.join(known)}.")
    if options.fp8 and options.dtype != "bfloat16":
        raise JetExportError("--fp8 works on a bfloat16 model.", "Leave --dtype out.")
    kv = options.dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    if kv not in ("fp8", options.dtype):
        raise JetExportError(f"--kv-cache-dtype {kv}: the cache holds the model dtype ({options.dtype}) or fp8.")
    return Dtypes.named(
        model=options.dtype,
        kv_cache=kv,
        state=options.state_dtype,
        state_interval=options.state_interval or 1,
        rollback=options.speculate + 1 if options.speculate else 0,
        mtp=options.mtp,
        fast_accumulation=options.fast_accumulation,
    )


def _config(options: BuildOptions, directory: Path | None) -> JetNemotronConfig:
    if directory is not None and not (options.random_weights and options.model in PRESETS):
        return JetNemotronConfig.from_json_file(directory / "config.json")
    try:
        return load_config(options.model)
    except JetExportError:
        if hub_id_of(options.model) is None or options.random_weights:
            raise
        return hub_config(options.model)


def _limits(options: BuildOptions, config: JetNemotronConfig) -> tuple[Limits, list[str]]:
    trained = config.max_position_embeddings
    seq = min(trained, DEFAULT_MAX_SEQ_LEN) if options.max_seq_len is None else options.max_seq_len
    chunk = min(DEFAULT_PREFILL_CHUNK if options.prefill_chunk is None else options.prefill_chunk, seq)
    for flag, value in (
        ("--max-batch-size", options.max_batch_size),
        ("--max-seq-len", seq),
        ("--prefill-chunk", chunk),
    ):
        if value < 1:
            raise JetExportError(f"{flag} {value}: must be at least 1.")
    warnings = []
    if seq > trained:
        warnings.append(f"max_seq_len {seq} exceeds the {trained} positions that the model was trained for.")
    return Limits(max_batch_size=options.max_batch_size, max_seq_len=seq, prefill_chunk=chunk), warnings
