"""A front end: a process that does HTTP, tokenization and text for the engine of another process.

    python -m jet_export.server.openai.frontend CONFIG

supervisor.py starts it, with a channel to the engine's process and a listening socket. It ends when it is told to
drain, with status 0, and when the engine's process is gone, with status 1. It does not import torch.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass

from jet_export.runtime.serving_engine import RequestLimits
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.server.ipc.engine_client import EngineClient
from jet_export.server.openai.app import create_app
from jet_export.server.openai.chat import load_chat_template, load_tokenizer_config
from jet_export.server.openai.http import GRACE, KEEP_ALIVE, Tls, http_server, run_server
from jet_export.server.openai.middleware import log_access
from jet_export.server.openai.options import API_KEY, ApiOptions
from jet_export.server.openai.spans import configure


@dataclass(frozen=True, kw_only=True)
class FrontEndConfig:
    """What a front end knows of its engine."""

    options: ApiOptions
    bundle: str  # its tokenizer and chat template
    limits: RequestLimits
    vocab_size: int
    keep_alive: float = KEEP_ALIVE  # seconds
    grace: float = GRACE  # seconds
    tls: Tls | None = None

    def encode(self) -> str:
        """Without the API key, which is in the environment."""
        return json.dumps({**asdict(self), "options": self.options.without_key()})

    @classmethod
    def decode(cls, text: str) -> FrontEndConfig:
        values = json.loads(text)
        options = ApiOptions.of(values["options"], os.environ.get(API_KEY))
        tls = values["tls"] and Tls(**values["tls"])
        return cls(**{**values, "limits": RequestLimits(*values["limits"]), "options": options, "tls": tls})


class FrontEnd:
    """`channel`: connected to the engine's process."""

    def __init__(self, config: FrontEndConfig, channel: socket.socket) -> None:
        self.engine = EngineClient(channel, load_tokenizer(config.bundle), config.limits, config.vocab_size)
        configure()
        template = load_chat_template(config.bundle, config.options.chat_template)
        app = create_app(self.engine, config.options, template, load_tokenizer_config(config.bundle))
        self.server = http_server(
            app, keep_alive=config.keep_alive, grace=config.grace, on_started=self.engine.ready, tls=config.tls
        )
        if config.options.access_log:
            log_access()
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
