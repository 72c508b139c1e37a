"""Tile sizes and launch options of the kernels, from configs.json, which benchmarks/kernels/tune.py writes.

A rule names an op, the SM it was measured on (null: any), conditions on sizes and dtypes (`where`: a value, or
{"min", "max"}, inclusive), and the configuration (`use`). Of the rules whose conditions hold, those of the SM in use
come before those of any SM, and the first one applies. Nothing is timed or chosen at run time: the same sizes on the
same kind of GPU always give the same kernels. Batch size is not a condition, since a graph serves every batch size.
`state_interval` is no op, but what `build --state-interval auto` asks for.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jet_export.utils.errors import JetExportError

TABLE = Path(__file__).with_name("configs.json")
# op -> the names that conditions may use, and the options of a configuration. `one_wave`: how many programs of the scan
# the GPU runs at the same time, one per multiprocessor; a batch of more uses the rule with many_heads.
OPS: dict[str, tuple[set[str], set[str]]] = {
    "attention_decode": (
        {"dtype", "cache_dtype", "head_dim", "group"},
        {"BN", "num_warps", "num_stages", "programs_per_sm"},
    ),
    "attention_prefill": ({"dtype", "cache_dtype", "head_dim", "group"}, {"BM", "BN", "num_warps", "num_stages"}),
    "rope_append": ({"dtype", "cache_dtype", "head_dim"}, {"BT", "num_warps"}),
    "delta_rule_prepare": ({"dtype", "head_k_dim"}, {"BT", "num_warps", "num_stages"}),
    "delta_rule_scan": ({"dtype", "head_k_dim", "many_heads"}, {"BV", "STAGES", "num_warps", "one_wave"}),
    "delta_rule_decode": ({"state_dtype", "head_k_dim", "head_v_dim"}, {"BV", "num_warps"}),
    "delta_rule_deferred": ({"state_dtype", "head_k_dim", "head_v_dim", "tokens"}, {"GROUPS", "BR", "num_warps"}),
    "delta_rule_inputs": ({"head_k_dim", "head_v_dim"}, {"BV", "num_warps"}),
    "delta_rule_verify": ({"head_k_dim", "head_v_dim"}, {"BV", "num_warps"}),
    "dynamic_conv": ({"dtype", "conv_size", "static"}, {"BT", "BD", "num_warps"}),
    "gated_rms_norm": ({"dtype", "head_v_dim"}, {"BR"}),
    "gemv": ({"dtype", "out_features", "in_features", "normed", "gated"}, {"BN", "BK", "STAGES", "num_warps"}),
    "skinny_gemm": (
        {"dtype", "out_features", "in_features", "gated", "split"},
        {"BN", "BK", "STAGES", "SPLITS", "num_warps"},
    ),
}
# What is decided when a bundle is built; largest batches are known then.
BUILDS: dict[str, tuple[set[str], set[str]]] = {
    "state_interval": ({"state_dtype", "head_k_dim", "head_v_dim", "max_batch_size"}, {"tokens"}),
}


@dataclass(frozen=True)
class Rule:
    op: str
    sm: int | None
    where: Mapping[str, Any]
    use: Mapping[str, int]
    source: str  # the file with the measurements behind it

    def holds(self, facts: Mapping[str, Any]) -> bool:
        for name, wanted in self.where.items():
            value = facts[name]
            if isinstance(wanted, Mapping):
                if not wanted.get("min", value) <= value <= wanted.get("max", value):
                    return False
            elif value != wanted:
                return False
        return True


def parse(rows: list[dict[str, Any]]) -> tuple[Rule, ...]:
    """Raises JetExportError naming the row that is not a rule."""
    rules = []
    for i, row in enumerate(rows):
        try:
            rule = Rule(row["op"], row["sm"], row["where"], row["use"], row["source"])
            facts, options = (OPS | BUILDS)[rule.op]
        except (KeyError, TypeError) as e:
            raise JetExportError(f"{TABLE.name}: rule {i} is not one: {e!r}.") from None
        if not rule.where.keys() <= facts or rule.use.keys() != options:
            raise JetExportError(
                f"{TABLE.name}: rule {i} of {rule.op} speaks of {sorted(rule.where)} and sets {sorted(rule.use)}.",
                f"Conditions: {', '.join(sorted(facts))}; a configuration: {', '.join(sorted(options))}.",
            )
        rules.append(rule)
    return tuple(rules)


@functools.cache
def table() -> tuple[Rule, ...]:
    return parse(json.loads(TABLE.read_text(encoding="utf-8")))


_sm: list[int | None] = []  # the target that `use_sm` names, innermost last
_override: dict[str, dict[str, int]] = {}


@contextmanager
def use_sm(sm: int | None) -> Iterator[None]:
    """Inside, configurations are those of this SM (90 for 9.0; None: any SM), whatever GPU this machine has."""
    _sm.append(sm)
    try:
        yield
    finally:
        _sm.pop()


@contextmanager
def override(op: str, use: dict[str, int]) -> Iterator[None]:
    """Inside, the op uses this configuration: for tuning and its tests."""
    before = dict(_override)
    _override[op] = use
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


@functools.cache
def _device_sm() -> int | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def current_sm() -> int | None:
    """The SM that kernels are configured for: `use_sm`'s, or this machine's GPU; None without one."""
    return _sm[-1] if _sm else _device_sm()


def find(rules: tuple[Rule, ...], op: str, sm: int | None, facts: Mapping[str, Any]) -> Rule:
    """The rule that applies. Raises JetExportError if none holds: the last rule of an op should have no conditions."""
    for wanted in dict.fromkeys((sm, None)):
        for rule in rules:
            if rule.op == op and rule.sm == wanted and rule.holds(facts):
                return rule
    raise JetExportError(f"{TABLE.name}: no rule of {op} holds for {dict(facts)}.")


def rule_for(op: str, sm: int | None, **facts: Any) -> Rule:
    """The committed rule that applies to these sizes and dtypes on this SM."""
    named = {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in facts.items()}
    return find(table(), op, sm, named)


def lookup(op: str, **facts: Any) -> dict[str, int]:
    """The configuration of `op` for these sizes and dtypes."""
    return dict(_override[op]) if op in _override else dict(rule_for(op, current_sm(), **facts).use)
