"""Parses and builds a whole exported model with TensorRT for RTX and the plugin library, on the CPU; prints JSON.

python rtx_model.py LIBRARY BUNDLE MAJOR.MINOR        BUNDLE: made by jet-export build --backend onnx"""

import json
import sys
from collections import Counter
from pathlib import Path

import onnx
import tensorrt_rtx as trt
from rtx_build import Logger

# Lowest, likeliest and highest of each profile: tokens, sequences.
PROFILES = {
    "prefill": {"tokens": (3, 512, 4096), "sequences": (1, 4, 8)},
    "decode": {"tokens": (1, 4, 8), "sequences": (1, 4, 8)},
}
OTHERS = (1, 8, 64)  # pool rows, table widths, outputs


def sizes(dim: int | str, profile: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """A dimension's three sizes: a number, a name, or a name + 1."""
    if isinstance(dim, int):
        return (dim,) * 3
    name, _, more = dim.partition(" + ")
    return tuple(n + int(more or 0) for n in profile.get(name, OTHERS))


def build(library: str, bundle: Path, sm: str) -> dict:
    logger = Logger()
    registry = trt.get_plugin_registry()
    registry.load_library(library)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parsed = trt.OnnxParser(network, logger).parse_from_file(str(bundle / "model.onnx"))
    kinds = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    result = {"parsed": parsed, "layers": kinds, "plan": 0}
    if parsed:
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm.replace('.', '')}"), 0)
        graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False).graph
        for known in PROFILES.values():
            profile = builder.create_optimization_profile()
            for tensor in graph.input:
                dims = [d.dim_param or d.dim_value for d in tensor.type.tensor_type.shape.dim]
                if any(isinstance(d, str) for d in dims):
                    profile.set_shape(tensor.name, *zip(*(sizes(d, known) for d in dims), strict=True))
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        result["plan"] = plan.nbytes if plan else 0
    return result | {"errors": logger.errors}


if __name__ == "__main__":
    print(json.dumps(build(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
