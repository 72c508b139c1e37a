"""ONNX: the exported graph, its node-by-node evaluator, and an engine over the evaluator."""
