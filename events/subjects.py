"""The subject tree, in one place: who may publish or subscribe where is decided by these prefixes."""

from __future__ import annotations

import re

from whimbrel.events.records import NAME_PATTERN

ROOT = "whimbrel.v1"
EVENTS = f"{ROOT}.event"
COMMANDS = f"{ROOT}.command"
REQUESTS = f"{ROOT}.request"
PAGES = f"{ROOT}.pages"

_NAME = re.compile(NAME_PATTERN)


def check_name(kind: str, name: str) -> str:
    """Returns `name`; raises ValueError where it could not be a subject token, KV key or folder name."""
    if not _NAME.match(name):
        raise ValueError(
            f"{kind} {name!r} is not a name: expected 1-63 of a-z, 0-9, - and _, "
            "starting and ending with a letter or digit"
        )
    return name


def event(host: str, event_type: str) -> str:
    return f"{EVENTS}.{host}.{event_type}"


def events_of_type(pattern: str = ">", host: str = "*") -> str:
    """`migration.*` → the filter that matches those events from every host."""
    return f"{EVENTS}.{host}.{pattern}"


def command(host: str, verb: str) -> str:
    return f"{COMMANDS}.{host}.{verb}"


def commands_to(host: str) -> str:
    return f"{COMMANDS}.{host}.*"


def request(verb: str) -> str:
    return f"{REQUESTS}.{verb}"


def pages(host: str, workload: str) -> str:
    return f"{PAGES}.{host}.{workload}"
