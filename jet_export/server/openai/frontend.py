"""A front end: a process that does HTTP, tokenization and text for the engine of another process.

    python -m jet_export.server.openai.frontend CONFIG

supervisor.py starts it, with a channel to the engine's process and a listening socket. It ends when it is told to
drain, with status 0, and when the engine's process is gone, with status 1. It does not import torch.
"""

from __future__ import annotations

import gc
import json
import socket
import sys
from dataclasses import asdict, dataclass

from jet_export.runtime.serving_engine import RequestLimits
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.server.ipc.engine_client import EngineClient
from jet_export.server.openai.app import create_app
from jet_export.server.openai.chat import load_chat_template
from jet_export.server.openai.http import GRACE, KEEP_ALIVE, http_server, run_server


@dataclass(frozen=True, kw_only=True)
class FrontEndConfig:
    """What a front end knows of its engine."""

    name: str  # of the model, for clients
    bundle: str  # its tokenizer and chat template
    limits: RequestLimits
    vocab_size: int
    keep_alive: float = KEEP_ALIVE  # seconds
    grace: float = GRACE  # seconds

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> FrontEndConfig:
        values = json.loads(text)
        return cls(**{**values, "limits": RequestLimits(*values["limits"])})


class FrontEnd:
    """`channel`: connected to the engine's process."""

    def __init__(self, config: FrontEndConfig, channel: socket.socket) -> None:
        self.engine = EngineClient(channel, load_tokenizer(config.bundle), config.limits, config.vocab_size)
        app = create_app(self.engine, config.name, load_chat_template(config.bundle))
        self.server = http_server(app, keep_alive=config.keep_alive, grace=config.grace, on_started=self.engine.ready)
        self.lost = False
        self.engine.on_drain, self.engine.on_lost = self._stop, self._on_lost

    def run(self, listener: socket.socket) -> int:
        """The exit status."""
        gc.freeze()
        run_server(self.server, listener)
        return int(self.lost)

    def _stop(self) -> None:
        self.server.should_exit = True

    def _on_lost(self) -> None:
        self.lost = True
        self._stop()


def main(config: str, channel: str, listener: str) -> int:
    """`channel`, `listener`: file descriptors."""
    end = FrontEnd(FrontEndConfig.decode(config), socket.socket(fileno=int(channel)))
    return end.run(socket.socket(fileno=int(listener)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
