"""TensorRT engines: a plan built from the ONNX graph and the plugin library, and the engine that runs it.

flavors   TensorRT and TensorRT for RTX: all differences between them
profiles  the input shapes of the two optimisation profiles
builder   parsing and building, in a process of its own
layers    the layer report of a built engine, and its checks
engine    runs a plan behind the engine interface
"""
