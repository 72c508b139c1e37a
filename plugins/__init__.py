"""TensorRT plugins jet::JetBlock and jet::Attention over the kernels of kernels/, compiled ahead of time."""
