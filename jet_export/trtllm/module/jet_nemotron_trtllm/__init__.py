"""`trtllm-serve DIR --custom_module_dirs <this directory>`: importing it registers JetNemotronForCausalLM.

TensorRT-LLM puts this directory's parent first on sys.path, so nothing else lies there. jet-export must be installed
in the same environment.
"""

from jet_export.trtllm.modeling import JetNemotronForCausalLM

__all__ = ["JetNemotronForCausalLM"]
