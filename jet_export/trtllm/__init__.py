"""Jet-Nemotron for TensorRT-LLM's PyTorch backend, as an out-of-tree model. Not run against TensorRT-LLM: written from
its published source, which `interfaces.toml` cites; see docs/backends/tensorrt-llm.md.

    adapt.py      dependence on TensorRT-LLM's version and on the assumptions of its hybrid-model code
    protocols.py  the parts of its objects that are used here, for mypy
    states.py     its cache manager's states and its batch, in the form that jet::jet_block takes
    fuse.py       published tensors to this model's modules
    config.py, mapper.py, modeling.py     the classes registered with TensorRT-LLM; no other file imports it
    module/       the directory for `--custom_module_dirs`, printed by `python -m jet_export.trtllm`
"""
