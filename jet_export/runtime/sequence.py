"""A request while it runs: its tokens, its text, and the callback that its outputs go to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from jet_export.runtime.params import Chooser, Output, Params
from jet_export.runtime.scheduler import Request
from jet_export.runtime.snapshot import Snapshot
from jet_export.runtime.tokenizer import StopText

OnOutput = Callable[[Output], None]
Keep = Literal["prompt", "end"]


class Sequence:
    """A request, its tokens and whom it reports to.

    `snapshot`, where it was asked to `keep` one, is there when the last Output comes, unless the request failed or was
    cancelled.
    """

    def __init__(
        self, request: Request, prompt: list[int], params: Params, text: StopText | None, tell: OnOutput,
        start: Snapshot | None, keep: Keep | None, keep_logits: bool,
    ) -> None:  # fmt: skip
        self.request, self.prompt, self.params = request, prompt, params
        self.text, self.tell = text, tell
        self.start, self.keep, self.keep_logits = start, keep, keep_logits
        self.chooser: Chooser | None = None  # from the first step on
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []  # of each token, on the CPU, where they are kept
        self.snapshot: Snapshot | None = None
        self.first_at = 0.0  # time of the first token
        self.finish_reason: str | None = None

    @property
    def reads_logits(self) -> bool:
        """Its logits, or its state as it is when it ends, are looked at: no step may be launched over them."""
        return self.keep is not None or self.keep_logits or self.params.logprobs is not None

    @property
    def last(self) -> int:
        """The token to feed next."""
        return (self.tokens or self.prompt)[-1]
