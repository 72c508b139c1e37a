"""Parses the ONNX graph and builds the plan, in a process of its own: a crash in native code ends only that process,
whose memory is freed at its end.

    python -m jet_export.backends.tensorrt.builder SPEC.json DIRECTORY

SPEC holds a `BuildSpec`. Into DIRECTORY are written engine.plan, result.json, and TensorRT's dump of the built engine's
layers, layers.txt.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jet_export.backends.tensorrt.flavors import FLAVORS

PLAN = "engine.plan"
VERIFY_PLAN = "verify.plan"  # of verify.onnx, with weights of its own
LAYERS = "layers.txt"
RESULT = "result.json"
LAYER_DUMP = ("Layers:\n", "Engine Layer Information:\n")


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """What to build, as JSON."""

    backend: str
    graph: str
    library: str
    sms: list[int]
    profiles: list[dict[str, list[tuple[int, ...]]]]  # see profiles.Shapes
    embed: bool = True  # the plugin library, in the plan


def make_logger(trt: Any) -> Any:
    """An ILogger that keeps errors, warnings and the dump of layers."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # trt is Any
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers = ""

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(text)
            elif text.startswith(LAYER_DUMP):
                self.layers = text

    return Logger()


def parse(trt: Any, builder: Any, graph: str, logger: Any) -> tuple[Any, Any]:
    """The network (None where parsing failed) and the parser, which owns the network's weights. Errors are logged."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where all networks are
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(graph):
        return network, parser
    logger.errors += [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return None, parser


def configure(trt: Any, builder: Any, spec: BuildSpec) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    FLAVORS[spec.backend].set_targets(trt, config, spec.sms)
    if spec.embed:
        config.plugins_to_serialize = [spec.library]
    for shapes in spec.profiles:
        profile = builder.create_optimization_profile()
        for name, (least, likely, most) in shapes.items():
            profile.set_shape(name, least, likely, most)
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError("an optimisation profile was refused")
    return config


def build(spec: BuildSpec, directory: Path) -> dict[str, Any]:
    """Write the plan and the dump. Returns whether the build succeeded, with TensorRT's errors and warnings."""
    trt = FLAVORS[spec.backend].load()
    logger = make_logger(trt)
    result: dict[str, Any] = {"version": trt.__version__, "built": False, "nodes": {}}
    if trt.get_plugin_registry().load_library(spec.library) is None:
        logger.errors.append("the plugin library was not loaded")
        return result | {"errors": logger.errors, "warnings": logger.warnings}
    builder = trt.Builder(logger)
    network, _parser = parse(trt, builder, spec.graph, logger)
    if network is not None:
        result["nodes"] = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
        try:
            plan = builder.build_serialized_network(network, configure(trt, builder, spec))
        except RuntimeError as e:
            plan = logger.errors.append(str(e))
        if plan is not None:
            (directory / PLAN).write_bytes(plan)
            (directory / LAYERS).write_text(logger.layers)
            result["built"] = True
    return result | {"errors": logger.errors, "warnings": logger.warnings}


def main(spec: str, directory: str) -> int:
    result = build(BuildSpec(**json.loads(Path(spec).read_text())), Path(directory))
    (Path(directory) / RESULT).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
