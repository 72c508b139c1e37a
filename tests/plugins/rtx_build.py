"""Parses and builds a graph of one JetBlock and one attention node with TensorRT for RTX, on the CPU; prints JSON.

python rtx_build.py LIBRARY NODE MAJOR.MINOR        NODE: how the attention is called; see plugins/src/creators.cpp"""

import json
import sys
from pathlib import Path

import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper
from plugin_nodes import MINI, fields_of, inputs_of

TYPES = {"bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32,
         "float8_e4m3fn": TensorProto.FLOAT8E4M3FN}  # fmt: skip
SMALL, LARGE = (8, 2), (256, 16)  # T, N


class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity, text):
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(text)


def build(library: str, attention: str, sm: str) -> dict:
    logger = Logger()
    registry = trt.get_plugin_registry()
    registry.load_library(library)
    names = ["JetBlock", attention]
    nodes, ins, outs, shapes = [], [], [], {}
    for op, case, states in zip(names, MINI, ([6, 7], [2]), strict=True):
        small, large = inputs_of(case, *SMALL), inputs_of(case, *LARGE)
        inputs = [f"{op}.{i}" for i in range(len(small))]
        for name, (dtype, low), (_, high) in zip(inputs, small, large, strict=True):
            dims = [a if a == b else f"{name}.{i}" for i, (a, b) in enumerate(zip(low, high, strict=True))]
            ins.append(helper.make_tensor_value_info(name, TYPES[dtype], dims))
            shapes[name] = (low, high)
        kinds = [small[0][0], *(small[i][0] for i in states)]
        outputs = [f"{op}.out{i}" for i in range(len(kinds))]
        ranks = [2, *(len(small[i][1]) for i in states)]
        outs += [helper.make_tensor_value_info(n, TYPES[k], [f"{n}.{i}" for i in range(r)])
                 for n, k, r in zip(outputs, kinds, ranks, strict=True)]  # fmt: skip
        nodes.append(helper.make_node(op, inputs, outputs, domain="jet", name=f"layer.{op}", **fields_of(case)))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("jet", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", ins, outs), opset_imports=opsets, ir_version=10)

    builder = trt.Builder(logger)
    network = builder.create_network()
    parsed = trt.OnnxParser(network, logger).parse(onnx.ModelProto.SerializeToString(model))
    result = {
        "parsed": parsed,
        "plan": 0,
        "layers": [network.get_layer(i).type.name for i in range(network.num_layers)],
    }
    if parsed:
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for name, (low, high) in shapes.items():
            if low != high:
                profile.set_shape(name, low, high, high)
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm.replace('.', '')}"), 0)
        plan = builder.build_serialized_network(network, config)
        result["plan"] = plan.nbytes if plan else 0
    return result | {"errors": logger.errors}


if __name__ == "__main__":
    print(json.dumps(build(str(Path(sys.argv[1])), *sys.argv[2:])))
