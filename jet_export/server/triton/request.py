"""What a request to the Triton model asks for.

A value may stand in a tensor, in `sampling_parameters` (JSON, as vLLM's backend has it) or in the request's parameters;
the tensor wins. What the engine could not honour is refused, not ignored.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.server.openai.protocol import One, Text, Zero, first_error
from jet_export.utils.errors import JetExportError

RESERVED = "triton_"  # parameters of Triton's own, as gRPC clients send them


def _strings(value: Any) -> Any:
    """One or several; an empty one, which TensorRT-LLM's clients send, is none."""
    return [s for s in ([value] if isinstance(value, str) else value) if s != ""]


class Asked(BaseModel):
    """A request's values. Those of the last group are taken only where they ask for nothing."""

    model_config = ConfigDict(extra="forbid")

    text_input: Text | None = None
    input_ids: list[int] | None = None
    stream: bool = False
    max_tokens: int = 16
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_words: Annotated[list[Text], BeforeValidator(_strings)] = []
    stop_token_ids: list[int] = []
    end_id: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    return_log_probs: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False
    exclude_input_in_output: bool | None = None
    return_finish_reason: bool = True
    return_num_input_tokens: bool = True
    return_num_output_tokens: bool = True

    beam_width: One = 1
    n: One = 1
    best_of: One = 1
    num_return_sequences: One = 1
    presence_penalty: Zero = 0.0
    frequency_penalty: Zero = 0.0
    min_tokens: Annotated[int, Field(ge=0, le=1)] = 0
    min_length: Annotated[int, Field(ge=0, le=1)] = 0
    length_penalty: float = 1.0  # of beams
    pad_id: int = 0  # nothing is padded
    bad_words: Literal[""] = ""

    @property
    def params(self) -> Params:
        """Raises JetExportError."""
        sampled = self.top_k is not None or self.top_p is not None
        seed = secrets.randbits(63) if self.seed is None else self.seed
        sampling = Sampling(
            temperature=float(sampled) if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed - 2**64 if 2**63 <= seed < 2**64 else seed,  # Params' is signed
        )
        stop_ids = (*self.stop_token_ids, *(() if self.end_id is None else (self.end_id,)))
        return Params(
            self.max_tokens, sampling, self.repetition_penalty, tuple(self.stop_words), stop_ids, self.ignore_eos,
            self._logprobs(),
        )  # fmt: skip

    def _logprobs(self) -> int | None:
        if self.logprobs is not None:
            return self.logprobs
        wanted = self.return_log_probs or self.return_cumulative_logprob or self.return_logprobs
        return 0 if wanted else None

    @property
    def with_prompt(self) -> bool:
        exclude = self.stream if self.exclude_input_in_output is None else self.exclude_input_in_output
        return not exclude

    def unwanted(self) -> set[str]:
        """Outputs to leave out."""
        flags = ("finish_reason", "num_input_tokens", "num_output_tokens")
        return {name for name in flags if not getattr(self, f"return_{name}")}


ALIASES = {"stop": "stop_words", "random_seed": "seed"}


def ask(tensors: dict[str, Any], parameters: str = "") -> Asked:
    """`tensors`: Python values by name; `parameters`: JSON. Raises JetExportError naming what is wrong."""
    values = {k: v for k, v in _object(parameters, "parameters").items() if not k.startswith(RESERVED)}
    values |= _object(tensors.get("sampling_parameters", ""), "sampling_parameters")
    values |= {k: v for k, v in tensors.items() if k != "sampling_parameters"}
    values = {ALIASES.get(k, k): v for k, v in values.items() if v is not None}
    try:
        asked = Asked.model_validate(values)
    except ValidationError as e:
        raise JetExportError(first_error(e)) from None
    if (asked.text_input is None) == (asked.input_ids is None):
        raise JetExportError("Give text_input or input_ids, one of the two.")
    return asked


def _object(text: str, where: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise JetExportError(f"{where} is not JSON ({str(e)[:200]}).") from None
    if not isinstance(values, dict):
        raise JetExportError(f"{where} is not a JSON object.")
    return values
