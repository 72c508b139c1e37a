"""Options that the serving scripts share: how every request is sampled, and what the engine serves with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jet_export.cli.options import parse_bytes
from jet_export.runtime.capacity import Serving
from jet_export.runtime.grammar import Grammar
from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling

PATIENT: dict[str, Any] = {"max_waiting": 100_000, "wait_timeout": 1e9}  # no request is refused

ITEMS = Path()  # in place of a file: LONG_SCHEMA
# Strings, numbers and punctuation, for as many tokens as a request asks for: no answer has all the items.
LONG_SCHEMA = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["person", "place", "thing"]},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
            "active": {"type": "boolean"},
        },
        "required": ["name", "age", "kind", "tags", "active"],
        "additionalProperties": False,
    },
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling, of every request")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--top-k", type=int, default=0, help="0 keeps every token")
    group.add_argument("--top-p", type=float, default=1.0, help="1 keeps every token")
    group.add_argument("--min-p", type=float, default=0.0, help="0 keeps every token")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="1: none")
    group.add_argument("--presence-penalty", type=float, default=0.0)
    group.add_argument("--frequency-penalty", type=float, default=0.0)
    group.add_argument("--logprobs", type=int, help="log probability of each token and of so many likely ones")
    add_schema(group)


def add_schema(group: Any) -> None:
    text = "answers follow this JSON schema; without FILE: one that no answer completes"
    group.add_argument("--schema", type=Path, nargs="?", const=ITEMS, metavar="FILE", help=text)


def schema_of(args: argparse.Namespace) -> Any:
    """The JSON schema that was asked for, or None."""
    path = args.schema
    return json.loads(path.read_text(encoding="utf-8")) if path and path != ITEMS else LONG_SCHEMA if path else None


def params_of(args: argparse.Namespace, new: int, seed: int = 0) -> Params:
    """Parameters of a request of exactly `new` tokens. Raises JetExportError for values out of range."""
    return Params(
        new,
        Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=seed),
        ignore_eos=True,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logprobs=args.logprobs,
        grammar=Grammar.json_schema(schema_of(args)) if args.schema else None,
    )


def response_format(grammar: Grammar) -> dict[str, Any]:
    """Of a JSON schema, as OpenAI-compatible servers take it."""
    return {"type": "json_schema", "json_schema": {"name": "schema", "schema": json.loads(grammar.text)}}


def sampling_of(params: Params) -> dict[str, Any]:
    """As results record it, and as an OpenAI-compatible server takes it: options at their defaults are left out."""
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs")
    values = {"top_k": params.sampling.top_k, "top_p": params.sampling.top_p, "min_p": params.sampling.min_p}
    values |= {name: getattr(params, name) for name in names}
    default = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | {name: getattr(Params(), name) for name in names}
    given: dict[str, Any] = {name: value for name, value in values.items() if value != default[name]}
    if params.grammar is not None:
        given["response_format"] = response_format(params.grammar)
    return {"temperature": params.sampling.temperature, **given}


def add_serving(parser: argparse.ArgumentParser, *, slots: int | None = None, prefix_cache: str | None = "0") -> None:
    """The arguments are defaults. No prefix cache unless asked for: a script that sends a prompt twice would be told
    how fast a prompt is that need not run."""
    group = parser.add_argument_group("the engine, as `jet-export serve` takes them")
    group.add_argument("--slots", type=int, default=slots, help="sequences at once")
    group.add_argument("--kv-tokens", type=int)
    group.add_argument("--token-budget", type=int, help="tokens per step")
    group.add_argument("--mixed-prefill", type=int, help="prompt tokens of a step that also decodes")
    group.add_argument("--tpot-ms", type=float, help="milliseconds of a step that decodes, which bound them")
    group.add_argument("--prefix-cache-bytes", default=prefix_cache, help="such as 512M or 4G; 0: no cache")
    group.add_argument("--host-cache-bytes", help="host memory for preempted requests and evicted prefixes")


def given_serving(args: argparse.Namespace) -> dict[str, Any]:
    """The serving options that were given, by the names of `Serving`."""
    names = ("slots", "kv_tokens", "token_budget", "mixed_prefill", "tpot_ms", "prefix_cache_bytes", "host_cache_bytes")
    found = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in found.keys() & {"prefix_cache_bytes", "host_cache_bytes"}:
        found[name] = parse_bytes(found[name], "--" + name.replace("_", "-"))
    return found


def serving_of(args: argparse.Namespace, **fixed: Any) -> Serving:
    return Serving(**{**PATIENT, **given_serving(args), **fixed})


def serve_arguments(args: argparse.Namespace) -> list[str]:
    """The same for the command line of `jet-export serve`."""
    words: list[str] = []
    for name, value in {**PATIENT, **given_serving(args)}.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words
