"""Jet-Nemotron for TensorRT-LLM's PyTorch backend, as an out-of-tree model. Not run against TensorRT-LLM: written from
its published source, which `interfaces.toml` cites; see docs/tensorrt-llm.md.

    adapt.py      what depends on TensorRT-LLM's version, and what its hybrid-model code takes for granted
    protocols.py  the parts of its objects that are used here, for mypy
    states.py     its cache manager's states and its batch, as jet::jet_block takes them
    fuse.py       published tensors to this model's modules
    config.py, mapper.py, modeling.py     the classes registered with TensorRT-LLM; nothing else imports it
    module/       the directory for `--custom_module_dirs`, printed by `python -m jet_export.trtllm`
"""
