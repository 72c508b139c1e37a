"""jet-export: engines for Jet-Nemotron hybrid linear-attention models.

`from jet_export import LLM; LLM("bundles/jet-tiny-fp8-inductor").generate("def ")`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jet_export.model.config import JetNemotronConfig
    from jet_export.model.jet_nemotron import JetNemotronForCausalLM
    from jet_export.runtime.llm import LLM, Completion

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "JetNemotronConfig", "JetNemotronForCausalLM"]

_HOME = {
    "LLM": "jet_export.runtime.llm",
    "Completion": "jet_export.runtime.llm",
    "JetNemotronConfig": "jet_export.model.config",
    "JetNemotronForCausalLM": "jet_export.model.jet_nemotron",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `jet-export --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'jet_export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
