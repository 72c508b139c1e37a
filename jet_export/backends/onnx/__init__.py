"""ONNX: the exported graph, its evaluation node by node, and an engine over that."""
