"""Adapts jet_export.server.triton.model to Triton's Python backend.

Copied into a model repository as 1/model.py by `jet-export serve BUNDLE --triton-repo DIR`.
"""

import logging
import sys
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        try:
            from jet_export.server.triton.model import TritonModel
        except ImportError as e:
            where = f"{sys.executable}, Python {sys.version.split()[0]}"
            raise pb_utils.TritonModelException(
                f"{e}. The Python backend runs {where}: install there, pip install 'jet-export[serve]', or put the "
                "environment that has jet-export first on the server's PATH."
            ) from None
        from jet_export.utils.errors import JetExportError

        try:
            self.model = TritonModel(pb_utils, args)
        except JetExportError as e:
            raise pb_utils.TritonModelException(str(e)) from None

    def execute(self, requests: list[Any]) -> None:
        self.model.execute(requests)

    def finalize(self) -> None:
        if hasattr(self, "model"):
            self.model.finalize()
