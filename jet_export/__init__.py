"""jet-export: engines for Jet-Nemotron hybrid linear-attention models.

`from jet_export import LLM; LLM("bundles/jet-tiny-fp8-inductor").generate("def ")`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jet_export.model.config import JetNemotronConfig
    from jet_export.model.jet_nemotron import JetNemotronForCausalLM
    from jet_export.runtime.async_llm import AsyncLLM
    from jet_export.runtime.capacity import Serving
    from jet_export.runtime.grammar import Grammar
    from jet_export.runtime.llm import LLM, Completion
    from jet_export.runtime.params import Params
    from jet_export.runtime.sampling import Sampling
    from jet_export.runtime.sessions import Session

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "Grammar",
    "JetNemotronConfig",
    "JetNemotronForCausalLM",
    "Params",
    "Sampling",
    "Serving",
    "Session",
]

_MODULES = {
    "LLM": "jet_export.runtime.llm",
    "AsyncLLM": "jet_export.runtime.async_llm",
    "Completion": "jet_export.runtime.llm",
    "Grammar": "jet_export.runtime.grammar",
    "Params": "jet_export.runtime.params",
    "Sampling": "jet_export.runtime.sampling",
    "Serving": "jet_export.runtime.capacity",
    "Session": "jet_export.runtime.sessions",
    "JetNemotronConfig": "jet_export.model.config",
    "JetNemotronForCausalLM": "jet_export.model.jet_nemotron",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `jet-export --help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'jet_export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
