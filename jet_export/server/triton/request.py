"""The fields of a request to the Triton model.

A value comes from a tensor, from `sampling_parameters` (JSON, as in vLLM's backend) or from the request's parameters,
in this order of precedence. Values that the engine cannot honour are refused, not ignored.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from jet_export.runtime.grammar import Grammar
from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.server.fields import Bias, One, Text, bias_pairs, first_error
from jet_export.utils.errors import JetExportError

RESERVED = "triton_"  # prefix of Triton's own parameters, which gRPC clients send


def _strings(value: Any) -> Any:
    """One string or several; TensorRT-LLM's clients send an empty string for none."""
    listed = [value] if isinstance(value, str) else value
    return [s for s in listed if s != ""] if isinstance(listed, list) else value  # else: refused by its type


class RequestFields(BaseModel):
    """The fields of a request. Those of the last group are accepted only with their neutral values."""

    model_config = ConfigDict(extra="forbid")

    text_input: Text | None = None
    input_ids: list[int] | None = None
    stream: bool = False
    max_tokens: int = 16
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Bias = {}
    min_tokens: int = 0
    priority: int = 0
    seed: int | None = None
    stop_words: Annotated[list[Text], BeforeValidator(_strings)] = []
    stop_token_ids: list[int] = []
    end_id: int | None = None
    ignore_eos: bool = False
    guided_decoding_guide_type: Literal["", "json", "json_schema", "regex", "ebnf_grammar"] = ""
    guided_decoding_guide: Text = ""
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
    length_penalty: float = 1.0  # of beam search
    pad_id: int = 0  # unused: nothing is padded
    bad_words: Literal[""] = ""

    @property
    def params(self) -> Params:
        """Raises JetExportError for values out of range. The seed is random unless given."""
        sampled = self.top_k is not None or self.top_p is not None
        seed = secrets.randbits(63) if self.seed is None else self.seed
        sampling = Sampling(
            temperature=float(sampled) if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            seed=seed - 2**64 if 2**63 <= seed < 2**64 else seed,  # Params takes a signed seed
        )
        stop_ids = (*self.stop_token_ids, *(() if self.end_id is None else (self.end_id,)))
        return Params(
            self.max_tokens,
            sampling,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop_words),
            stop_ids=stop_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self._logprobs(),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias_pairs(self.logit_bias),
            min_tokens=self.min_tokens,
            priority=self.priority,
            grammar=self._grammar(),
        )

    def _grammar(self) -> Grammar | None:
        kind, guide = self.guided_decoding_guide_type, self.guided_decoding_guide
        if not kind and guide:
            raise JetExportError("guided_decoding_guide needs guided_decoding_guide_type.")
        if kind in ("", "json"):
            return Grammar.json_object() if kind else None
        if not guide:
            raise JetExportError(f"guided_decoding_guide_type {kind} needs guided_decoding_guide.")
        make = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "ebnf_grammar": Grammar.lark}[kind]
        return make(guide)

    def _logprobs(self) -> int | None:
        if self.logprobs is not None:
            return self.logprobs
        wanted = self.return_log_probs or self.return_cumulative_logprob or self.return_logprobs
        return 0 if wanted else None

    @property
    def with_prompt(self) -> bool:
        exclude = self.stream if self.exclude_input_in_output is None else self.exclude_input_in_output
        return not exclude

    def disabled_outputs(self) -> set[str]:
        """Outputs that the request turns off."""
        flags = ("finish_reason", "num_input_tokens", "num_output_tokens")
        return {name for name in flags if not getattr(self, f"return_{name}")}


ALIASES = {"stop": "stop_words", "random_seed": "seed", "min_length": "min_tokens"}


def parse_request(tensors: dict[str, Any], parameters: str = "") -> RequestFields:
    """`tensors`: Python values by name; `parameters`: JSON. Raises JetExportError that names the bad field."""
    values = {k: v for k, v in _json_object(parameters, "parameters").items() if not k.startswith(RESERVED)}
    values |= _json_object(tensors.get("sampling_parameters", ""), "sampling_parameters")
    values |= {k: v for k, v in tensors.items() if k != "sampling_parameters"}
    values = {ALIASES.get(k, k): v for k, v in values.items() if v is not None}
    try:
        fields = RequestFields.model_validate(values)
    except ValidationError as e:
        raise JetExportError(first_error(e)) from None
    if (fields.text_input is None) == (fields.input_ids is None):
        raise JetExportError("Give text_input or input_ids, one of the two.")
    return fields


def _json_object(text: str, where: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, TypeError, RecursionError) as e:
        raise JetExportError(f"{where} is not JSON ({str(e)[:200]}).") from None
    if not isinstance(values, dict):
        raise JetExportError(f"{where} is not a JSON object.")
    return values
