"""TensorRT engines: the ONNX graph and the plugin library become a plan, which the runtime runs behind Engine.

flavors   TensorRT and TensorRT for RTX: everything in which they differ
profiles  the shapes that each of the two optimisation profiles takes
builder   parse and build, in a process of its own
layers    the layer report of a built engine, and what it must show
build     the steps of `jet-export build`
engine    the runtime
"""
