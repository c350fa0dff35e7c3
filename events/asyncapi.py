"""Writes docs/asyncapi.json from the structs: the contract for programs in any language and their tools.

`python -m whimbrel.events.asyncapi` prints an AsyncAPI 3.0 document. Its operations are Whimbrel's: it sends
events and page samples, it receives requests (and hosts receive commands), and answers both.
"""

from __future__ import annotations

import inspect
import sys
import typing
from typing import Any

import msgspec

from whimbrel.events import commands, facts, reference, requests, samples, streams, subjects

VERSION = "1.0.0"
"""Of the bus, `whimbrel.v1`; not of the program."""
_BINDING = "0.1.0"
_HOST = "host"


def document() -> dict[str, Any]:
    """The AsyncAPI document as JSON values."""
    events, verbs, asked = (
        typing.get_args(union) for union in (facts.AnyEvent, commands.AnyCommand, requests.AnyRequest)
    )
    replies, answers = typing.get_args(commands.AnyReply), typing.get_args(requests.AnyAnswer)
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for type_ in events:
        name = f"event-{_tag(type_).replace('.', '-')}"
        channels[name] = _channel(subjects.event("{host}", _tag(type_)), type_, [_HOST])
        operations[f"send-{name}"] = _operation("send", name, [type_], f"Stored in {streams.EVENT_STREAM}.")
    for type_ in verbs:
        name = f"command-{_tag(type_)}"
        channels[name] = _channel(subjects.command("{host}", _tag(type_)), type_, [_HOST])
        operations[f"receive-{name}"] = _operation("receive", name, [type_], "Taken by the host's agent.") | {
            "reply": _reply("replies", replies)
        }
    for type_ in asked:
        name = f"request-{_tag(type_)}"
        channels[name] = _channel(subjects.request(_tag(type_)), type_, [])
        operations[f"receive-{name}"] = _operation(
            "receive", name, [type_], "Taken by the active controller."
        ) | {
            "reply": _reply("answers", answers),
            "bindings": {"nats": {"queue": "controller", "bindingVersion": _BINDING}},
        }
    channels["pages"] = _channel(
        subjects.pages("{host}", "{workload}"), samples.PageSample, [_HOST, "workload"]
    )
    operations["send-pages"] = _operation("send", "pages", [samples.PageSample], "Heard live, not stored.")
    channels["replies"] = _inbox("Where the sender of a command asked to be answered.", replies)
    channels["answers"] = _inbox("Where the sender of a request asked to be answered.", answers)
    messages = {
        type_.__name__: _message(type_, stored=type_ in events)
        for type_ in (*events, *verbs, *replies, *asked, *answers, samples.PageSample)
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Whimbrel",
            "version": VERSION,
            "description": "Live migration of Linux services, told in events. Generated from the structs in "
            "whimbrel.events. A field is only ever added, with a default: ignore what you do not know.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "That of `whimbrel controller --embedded`, or yours, with JetStream.",
            }
        },
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": messages,
            "messageTraits": {"cloudEvent": {"headers": _headers()}},
            "parameters": {
                "host": {"description": "Name of a host, gate or controller."},
                "workload": {"description": "Name of a workload."},
            },
            "schemas": _schemas((*events, *verbs, *replies, *asked, *answers, samples.PageSample)),
        },
    }


def text() -> str:
    """The file's content."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=1).decode() + "\n"


def _tag(type_: type) -> str:
    return str(type_.__struct_config__.tag)  # type: ignore[attr-defined]


def _channel(address: str, type_: type, parameters: list[str]) -> dict[str, Any]:
    channel: dict[str, Any] = {
        "address": address,
        "messages": {type_.__name__: _ref("messages", type_.__name__)},
        "servers": [{"$ref": "#/servers/nats"}],
        "bindings": {"nats": {}},
    }
    if parameters:
        channel["parameters"] = {name: _ref("parameters", name) for name in parameters}
    return channel


def _inbox(description: str, types: tuple[type, ...]) -> dict[str, Any]:
    return {
        "address": None,
        "description": description,
        "messages": {type_.__name__: _ref("messages", type_.__name__) for type_ in types},
    }


def _operation(action: str, channel: str, types: list[type], summary: str) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "messages": [{"$ref": f"#/channels/{channel}/messages/{type_.__name__}"} for type_ in types],
        "bindings": {"nats": {"bindingVersion": _BINDING}},
    }


def _reply(channel: str, types: tuple[type, ...]) -> dict[str, Any]:
    return {
        "address": {"location": "$message.header#/reply-to", "description": "The NATS reply subject."},
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{type_.__name__}"} for type_ in types],
    }


def _message(type_: type, *, stored: bool) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": _tag(type_),
        "title": type_.__name__,
        "contentType": "application/json",
        "payload": _ref("schemas", type_.__name__),
    }
    if type_.__doc__ and type_.__doc__ != getattr(type_.__base__, "__doc__", None):
        message["summary"] = inspect.cleandoc(type_.__doc__).replace("\n", " ")
    if stored:
        message["traits"] = [_ref("messageTraits", "cloudEvent")]
    return message


def _headers() -> dict[str, Any]:
    """CloudEvents 1.0 in binary mode, and JetStream's own duplicate check."""
    text_ = {"type": "string"}
    return {
        "type": "object",
        "required": ["ce-specversion", "ce-id", "ce-source", "ce-type", "ce-time", "Nats-Msg-Id"],
        "properties": {
            "ce-specversion": {"const": "1.0"},
            "ce-id": text_,
            "ce-source": text_,
            "ce-type": text_,
            "ce-time": {"type": "string", "format": "date-time"},
            "ce-subject": {**text_, "description": "Id of the migration."},
            "ce-cause": {**text_, "description": "Id of the event or command that led to this one."},
            "content-type": {"const": "application/json"},
            "Nats-Msg-Id": {**text_, "description": "Equals ce-id: stored once, however often published."},
        },
    }


def _schemas(types: tuple[type, ...]) -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    named = {type_.__name__: type_ for type_ in _all_types(types)}
    for name, schema in schemas.items():
        docs = reference.field_docs(named[name]) if name in named else {}
        for field, property_ in schema.get("properties", {}).items():
            if field in docs and "$ref" not in property_:
                property_["description"] = docs[field].replace("\\|", "|")
    return {name: _draft_07(schema) for name, schema in sorted(schemas.items())}


def _all_types(types: tuple[type, ...]) -> set[type]:
    """Structs among `types` and in their fields, however deep."""
    found: set[type] = set()
    waiting: list[Any] = list(types)
    while waiting:
        type_ = waiting.pop()
        waiting += typing.get_args(type_)
        if isinstance(type_, type) and issubclass(type_, msgspec.Struct) and type_ not in found:
            found.add(type_)
            waiting += typing.get_type_hints(type_).values()
    return found


def _draft_07(schema: Any) -> Any:
    """AsyncAPI's schemas are JSON Schema draft 07, in which a tuple's `prefixItems` is `items`."""
    if isinstance(schema, list):
        return [_draft_07(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _draft_07(value) for key, value in schema.items()}
    if "prefixItems" in changed:
        changed["additionalItems"] = changed.pop("items", False)
        changed["items"] = changed.pop("prefixItems")
    return changed


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


if __name__ == "__main__":
    sys.stdout.write(text())
