"""Check this package against interfaces.toml, by AST; with --source, interfaces.toml against TensorRT-LLM's source.

    python -m jet_export.trtllm.check_interfaces [--source DIR_OF_tensorrt_llm_OR_A_CLONE]

Checked without tensorrt_llm: every import of it is listed; every call of an imported name, of its attributes and of
`super()` in a derived class fits the listed signature; every attribute that is used is listed; our methods that it
calls accept the arguments it passes; protocols.py has the listed members, with their arguments.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import BoundArguments, Parameter, Signature
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIST = HERE / "interfaces.toml"
FOREIGN = ("tensorrt_llm", "transformers")


@dataclass
class Interfaces:
    """The list, by name; one name can be a class, have hooks and be a protocol."""

    callables: dict[str, Signature] = field(default_factory=dict)  # classes, functions, methods
    hooks: dict[str, Signature] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    protocols: dict[str, dict[str, Signature | None]] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path = LIST) -> Interfaces:
        out = cls(entries=tomllib.loads(path.read_text(encoding="utf-8"))["interface"])
        for entry in out.entries:
            names = [entry["name"], *([entry["moved"]] if "moved" in entry else [])]
            kind = entry["kind"]
            if kind == "protocol":
                out.protocols[entry["protocol"]] = dict(_member(m) for m in entry["members"])
            elif kind == "attribute":
                out.attributes.update(names)
            elif kind in ("class", "function", "method", "hook"):
                table = out.hooks if kind == "hook" else out.callables
                table.update(dict.fromkeys(names, parse_signature(entry["signature"])))
        return out

    def __contains__(self, name: str) -> bool:
        return name in self.callables or name in self.attributes

    def is_module(self, name: str) -> bool:
        return any(known.startswith(f"{name}.") for known in (*self.callables, *self.attributes))


def parse_signature(text: str) -> Signature:
    """`a, b=1, *, c, **kwargs` -> inspect.Signature; defaults become None."""
    text = text.replace("*, **", "**")
    arguments = ast.parse(f"def f({text}): pass").body[0]
    assert isinstance(arguments, ast.FunctionDef)
    return _signature(arguments.args)


def _signature(a: ast.arguments, skip_self: bool = False) -> Signature:
    positional = [*a.posonlyargs, *a.args]
    defaults: list[Any] = [Parameter.empty] * (len(positional) - len(a.defaults)) + [None] * len(a.defaults)
    out = [
        Parameter(p.arg, Parameter.POSITIONAL_OR_KEYWORD, default=d) for p, d in zip(positional, defaults, strict=True)
    ][int(skip_self) :]
    if a.vararg:
        out.append(Parameter(a.vararg.arg, Parameter.VAR_POSITIONAL))
    for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        out.append(Parameter(p.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if d is None else None))
    if a.kwarg:
        out.append(Parameter(a.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(out)


def _member(text: str) -> tuple[str, Signature | None]:
    """ "f(a, b=None)" -> ("f", signature); "x" -> ("x", None)."""
    name, bracket, rest = text.partition("(")
    return name, parse_signature(rest[:-1]) if bracket else None


def bind(signature: Signature, call: ast.Call) -> BoundArguments | None:
    """Raises TypeError if the call does not fit. *args and **kwargs in the call stand for any missing arguments."""
    args = [a for a in call.args if not isinstance(a, ast.Starred)]
    kwargs = {k.arg: k.value for k in call.keywords if k.arg is not None}
    loose = len(args) < len(call.args) or len(kwargs) < len(call.keywords)
    return (signature.bind_partial if loose else signature.bind)(*args, **kwargs)


class Module(ast.NodeVisitor):
    """One file of ours: its imports, calls, attributes and overrides. `problems` describes what does not fit."""

    def __init__(self, path: Path, interfaces: Interfaces) -> None:
        self.path, self.known = path, interfaces
        self.problems: list[str] = []
        self.used: set[str] = set()
        self.names: dict[str, set[str]] = {}  # local name -> the full names that it may stand for
        self.bases: list[list[str]] = []
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def problem(self, node: ast.AST, what: str) -> None:
        self.problems.append(f"{self.path.name}:{getattr(node, 'lineno', 0)}: {what}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in FOREIGN:
                if alias.name != alias.name.split(".")[0] or alias.asname:
                    self.problem(node, f"import {alias.name}: import names from it instead")
                self.names[alias.name] = {alias.name}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or (node.module or "").split(".")[0] not in FOREIGN:
            return
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if name not in self.known:
                self.problem(node, f"{name} is not listed")
            self.used.add(name)
            self.names.setdefault(alias.asname or alias.name, set()).add(name)

    def resolve(self, node: ast.AST) -> set[str]:
        """The full names that an expression like A.b.c may stand for; empty if it is not TensorRT-LLM's."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {f"{owner}.{node.attr}" for owner in self.resolve(node.value)}
        return set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for name in self.resolve(node):
            self.used.add(name)
            if name not in self.known and not self.known.is_module(name):
                self.problem(node, f"{name} is not listed")
        is_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        inherited = {f"{base}.{node.attr}" for base in (self.bases[-1] if self.bases and is_self else [])}
        self.used |= inherited & (self.known.attributes | self.known.callables.keys())
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = sorted(name for base in node.bases for name in self.resolve(base))
        self.bases.append(bases)
        for method in (n for n in node.body if isinstance(n, ast.FunctionDef)):
            for base in bases:
                self._check_hook(f"{base}.{method.name}", method)
        self.generic_visit(node)
        self.bases.pop()

    def _check_hook(self, name: str, method: ast.FunctionDef) -> None:
        listed = self.known.hooks.get(name)
        if listed is None:
            return
        self.used.add(name)
        fixed = [p for p in listed.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        try:
            _signature(method.args, skip_self=True).bind(**{p.name: None for p in fixed})
        except TypeError as e:
            self.problem(method, f"{name} is called with ({', '.join(p.name for p in fixed)}): {e}")

    def visit_Call(self, node: ast.Call) -> None:
        for name in self._called(node):
            signature = self.known.callables.get(name)
            if signature is None:
                self.problem(node, f"{name} is called and not listed as callable")
                continue
            self.used.add(name)
            try:
                bind(signature, node)
            except TypeError as e:
                self.problem(node, f"{name}({', '.join(signature.parameters)}): {e}")
        self.generic_visit(node)

    def _called(self, node: ast.Call) -> set[str]:
        f = node.func
        inner = f.value.func if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Call) else None
        if isinstance(f, ast.Attribute) and isinstance(inner, ast.Name) and inner.id == "super" and self.bases:
            return {base if f.attr == "__init__" else f"{base}.{f.attr}" for base in self.bases[-1]}
        return self.resolve(f)


def check_protocols(path: Path, interfaces: Interfaces) -> list[str]:
    """Differences between each Protocol and the listed members of the same name."""
    problems, seen = [], set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not (
            isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases)
        ):
            continue
        seen.add(node.name)
        ours = dict(_protocol_members(node))
        listed = interfaces.protocols.get(node.name)
        if listed is None:
            problems.append(f"{path.name}: {node.name} is not listed")
            continue
        for name in sorted(ours.keys() ^ listed.keys()):
            where = "protocols.py" if name in listed else "interfaces.toml"
            problems.append(f"{path.name}: {node.name}.{name} is not in {where}")
        for name in ours.keys() & listed.keys():
            mine, theirs = ours[name], listed[name]
            if (mine is None) != (theirs is None):
                problems.append(f"{path.name}: {node.name}.{name} is a method on one side only")
            elif mine is not None and theirs is not None:
                extra = set(mine.parameters) - set(theirs.parameters)
                if extra:
                    problems.append(f"{path.name}: {node.name}.{name} takes {sorted(extra)}, which is not listed")
    problems += [f"{path.name}: {name} is listed and not there" for name in sorted(interfaces.protocols.keys() - seen)]
    return problems


def _protocol_members(node: ast.ClassDef) -> Iterator[tuple[str, Signature | None]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id, None
        elif isinstance(item, ast.FunctionDef):
            plain = any(isinstance(d, ast.Name) and d.id == "property" for d in item.decorator_list)
            yield item.name, None if plain else _signature(item.args, skip_self=True)


def check(folder: Path = HERE, interfaces: Interfaces | None = None) -> list[str]:
    """A description of each problem, including listed interfaces that are not used."""
    known = interfaces or Interfaces.load()
    problems, used = check_protocols(folder / "protocols.py", known), set[str]()
    for path in sorted(folder.glob("*.py")):
        module = Module(path, known)
        problems += module.problems
        used |= module.used
    moved = {e["moved"]: e["name"] for e in known.entries if "moved" in e}
    used |= {moved[name] for name in used if name in moved} | {new for new, old in moved.items() if old in used}
    unused = (known.callables.keys() | known.attributes | known.hooks.keys()) - used
    return problems + [f"interfaces.toml: {name} is listed and not used" for name in sorted(unused)]


def compare_source(source: Path, interfaces: Interfaces) -> tuple[list[str], list[str]]:
    """(a line per interface found, with its location; the differences) for an installed tensorrt_llm or a clone."""
    root = source if source.name != "tensorrt_llm" else source.parent
    found, problems = [], []
    for entry in interfaces.entries:
        if entry["kind"] in ("reads",) or not entry["name"].startswith("tensorrt_llm"):
            continue
        candidates = [entry["name"], *([entry["moved"]] if "moved" in entry else [])]
        node, path = next(((n, p) for n, p in (_find(root, c) for c in candidates) if n), (None, None))
        if node is None:
            problems.append(f"{entry['name']}: not found")
            continue
        found.append(f"{entry['name']}: {path}:{getattr(node, 'lineno', 0)}")
        theirs = _source_signature(node)
        if entry["kind"] in ("class", "function", "method") and theirs is not None:
            listed = parse_signature(entry["signature"])
            differing = sorted(set(listed.parameters) ^ set(theirs.parameters) - {"args", "kwargs"})
            if differing:
                problems.append(f"{entry['name']}: parameters differ from the list: {', '.join(differing)}")
    return found, problems


def _find(root: Path, name: str) -> tuple[ast.AST | None, Path | None]:
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        base = root.joinpath(*parts[:i])
        path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if path.is_file():
            node: ast.AST | None = ast.parse(path.read_text(encoding="utf-8"))
            for part in parts[i:]:
                node = next((n for n in getattr(node, "body", []) if _defines(n, part)), None)
            return node, path
    return None, None


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name) and node.target.id == name
    return getattr(node, "name", None) == name


def _source_signature(node: ast.AST) -> Signature | None:
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        return _signature(init.args, skip_self=True) if init else None
    if isinstance(node, ast.FunctionDef):
        first = node.args.args[0].arg if node.args.args else ""
        return _signature(node.args, skip_self=first in ("self", "cls"))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", type=Path, help="an installed tensorrt_llm package, or a clone of TensorRT-LLM")
    options = parser.parse_args()
    interfaces = Interfaces.load()
    problems = check(interfaces=interfaces)
    if options.source:
        found, differing = compare_source(options.source, interfaces)
        print("\n".join(found))
        problems += differing
    print("\n".join(problems) if problems else f"{len(interfaces.entries)} interfaces listed; the code keeps to them.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
