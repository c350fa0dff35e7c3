"""Writes docs/events.md from the structs, so that the reference cannot say anything else than the code.

`python -m whimbrel.events.reference` prints it. Docstrings of fields are strings after them, which Python
throws away: they are read from the source.
"""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import re
import sys
import types
import typing
from functools import cache
from typing import Any

import msgspec

from whimbrel.events import commands, facts, records, requests, samples, subjects

_INTRODUCTION = """\
# What is said on the bus

<!-- Generated: `python -m whimbrel.events.reference > docs/events.md`; a test proves that it is current. -->

Payloads are JSON. A field is only ever added, with a default; readers ignore fields they do not know.
Times are Unix seconds; units stand in the names.

| said | subject | how |
|---|---|---|
| an event | `{event}` | stream `WHIMBREL_EVENTS`, stored once per id; CloudEvents 1.0 headers `ce-*` |
| a command | `{command}` | request/reply; refused after `expires_at`; the same id is done once |
| a request | `{request}` | request/reply, answered by the active controller |
| a page sample | `{pages}` | core NATS, not stored |
| a record | KV `whimbrel_hosts`, `whimbrel_workloads`, `whimbrel_registers` | changed by compare-and-set |

```python
from whimbrel.events import Bus, MigrationCompleted

async with await Bus.connect("nats://127.0.0.1:4222", "my-program") as bus:
    async with bus.subscribe("migration.>") as events:
        async for event in events:
            match event:
                case MigrationCompleted(report=report):
                    print(report.workload, report.downtime_ms)
```
"""


def markdown() -> str:
    """The whole reference."""
    parts = [
        _INTRODUCTION.format(
            event=subjects.event("<host>", "<type>"),
            command=subjects.command("<host>", "<verb>"),
            request=subjects.request("<verb>"),
            pages=subjects.pages("<host>", "<workload>"),
        ),
        _section("Events", facts, facts.AnyEvent, facts.Event),
        _section("Commands", commands, commands.AnyCommand, commands.Command),
        _section("Replies", None, commands.AnyReply, commands.Reply),
        _section("Requests", requests, requests.AnyRequest, requests.Request),
        _section("Answers", None, requests.AnyAnswer, None),
        _section("Page samples", samples, samples.PageSample, None),
        "## Records and parts\n",
        _prose(records),
        *(_struct(type_, None) for type_ in _defined_in(records)),
        _struct(commands.FileFact, None),
        _struct(commands.JournalLine, None),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _section(title: str, module: types.ModuleType | None, union: Any, base: type | None) -> str:
    parts = [f"## {title}\n", _prose(module) if module else ""]
    if base is not None:
        parts.append(f"All of them carry:\n\n{_fields(base, None)}")
    parts += [_struct(type_, base) for type_ in typing.get_args(union) or (union,)]
    return "\n".join(part for part in parts if part)


def _prose(documented: Any) -> str:
    return inspect.cleandoc(documented.__doc__ or "") + "\n"


def _defined_in(module: types.ModuleType) -> list[type]:
    return [
        type_
        for type_ in vars(module).values()
        if inspect.isclass(type_)
        and type_.__module__ == module.__name__
        and issubclass(type_, msgspec.Struct | enum.Enum)
    ]


def _struct(type_: type, base: type | None) -> str:
    if issubclass(type_, enum.Enum):
        members = " · ".join(f"`{member.value}`" for member in type_)
        return f"### {type_.__name__}\n\n{_own_doc(type_)}One of {members}.\n"
    tag = type_.__struct_config__.tag  # type: ignore[attr-defined]
    heading = f"### {type_.__name__}" + (f" · `{tag}`" if tag else "") + "\n"
    return "\n".join(part for part in (heading, _own_doc(type_), _fields(type_, base)) if part)


def _own_doc(type_: type) -> str:
    # An enum without a docstring of its own has Python's.
    node = _class_node(type_)
    doc = ast.get_docstring(node)
    return doc + "\n\n" if doc and issubclass(type_, enum.Enum) else (doc + "\n" if doc else "")


def _fields(type_: type, base: type | None) -> str:
    inherited = {field.name for field in msgspec.structs.fields(base)} if base is not None else set()
    hints = typing.get_type_hints(type_)
    docs = field_docs(type_)
    rows = [
        f"| `{field.name}` | {_type_text(hints[field.name])}{_default(field)} | {docs.get(field.name, '')} |"
        for field in msgspec.structs.fields(type_)
        if field.name not in inherited
    ]
    if not rows:
        return ""
    return "\n".join(["| field | type | |", "|---|---|---|", *rows]) + "\n"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return " = …"
    if field.default is msgspec.NODEFAULT:
        return ""
    default = field.default.value if isinstance(field.default, enum.Enum) else field.default
    return f" = `{msgspec.json.encode(default).decode()}`"


def _type_text(type_: Any) -> str:
    if type_ is type(None):
        return "null"
    if type_ is Ellipsis:
        return "…"
    arguments = typing.get_args(type_)
    origin = typing.get_origin(type_)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_text(argument) for argument in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"list of {_type_text(arguments[0])}"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_text(argument) for argument in arguments)}]"
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct | enum.Enum):
        return f"[{type_.__name__}](#{_anchor(type_)})"
    return str(getattr(type_, "__name__", type_))


def _anchor(type_: type) -> str:
    return type_.__name__.lower()


def field_docs(type_: type) -> dict[str, str]:
    """name → what stands after the field, also for the fields of its bases."""
    docs: dict[str, str] = {}
    for class_ in reversed(type_.__mro__):
        if class_.__module__.startswith("whimbrel."):
            body = _class_node(class_).body
            for field, after in itertools.pairwise(body):
                match field, after:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        docs[name] = re.sub(r"\s+", " ", inspect.cleandoc(text)).replace("|", "\\|")
    return docs


def _class_node(type_: type) -> ast.ClassDef:
    return _classes_of(sys.modules[type_.__module__])[type_.__name__]


@cache
def _classes_of(module: types.ModuleType) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


if __name__ == "__main__":
    sys.stdout.write(markdown())
