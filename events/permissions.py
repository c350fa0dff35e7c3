"""What each kind of client may say and hear, for the authorization part of a NATS server's configuration.

Permissions follow the subject tree: an agent speaks for its own host only. Every client's inbox has a prefix
of its own (`_INBOX.<name>`), so that none can read another's answers.
"""

from __future__ import annotations

import msgspec

from whimbrel.events import dead_letters, subjects
from whimbrel.events.streams import BUCKETS, EVENT_STREAM, bucket_stream, bucket_subject


class Permissions(msgspec.Struct, frozen=True, kw_only=True):
    """Subjects, with NATS wildcards. Answers to what it was asked are allowed besides."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]

    def as_config(self) -> str:
        """The `permissions` block of a user in nats-server's configuration."""

        def listed(subjects_: tuple[str, ...]) -> str:
            return msgspec.json.encode(subjects_).decode()

        return (
            f"{{ publish: {{ allow: {listed(self.publish)} }}, "
            f"subscribe: {{ allow: {listed(self.subscribe)} }}, "
            'allow_responses: { max: 1, expires: "5m" } }'
        )


def of_agent(host: str) -> Permissions:
    """Events, samples and the host record of `host` only; registers and workloads as the migration needs."""
    subjects.check_name("host", host)
    return Permissions(
        publish=(
            f"{subjects.EVENTS}.{host}.>",
            f"{subjects.PAGES}.{host}.*",
            bucket_subject("hosts", host),
            bucket_subject("workloads", ">"),
            bucket_subject("registers", ">"),
            *(f"$JS.API.STREAM.INFO.{bucket_stream(table)}" for table in BUCKETS),
            *_reading(EVENT_STREAM, *(bucket_stream(table) for table in ("hosts", "workloads", "registers"))),
        ),
        subscribe=(f"_INBOX.{host}.>", subjects.commands_to(host)),
    )


def of_controller(name: str) -> Permissions:
    """Commands to everybody, events of its own, all records; it also answers requests."""
    subjects.check_name("controller", name)
    return Permissions(
        publish=(
            f"{subjects.EVENTS}.{name}.>",
            f"{subjects.COMMANDS}.>",
            *(bucket_subject(table, ">") for table in BUCKETS),
            "$JS.API.>",
            "$JS.ACK.>",
        ),
        subscribe=(
            f"_INBOX.{name}.>",
            f"{subjects.EVENTS}.>",
            f"{subjects.REQUESTS}.>",
            f"{subjects.PAGES}.>",
            subjects.commands_to(name),
        ),
    )


def of_reader(name: str) -> Permissions:
    """A program that only watches: events, samples and records."""
    subjects.check_name("reader", name)
    return Permissions(
        publish=(*_reading(EVENT_STREAM, *(bucket_stream(table) for table in BUCKETS)),),
        subscribe=(f"_INBOX.{name}.>", f"{subjects.EVENTS}.>", f"{subjects.PAGES}.>"),
    )


def of_reactor(name: str) -> Permissions:
    """As of_reader(); it also files dead letters and is given those that are replayed."""
    reader = of_reader(name)
    stream = dead_letters.STREAM
    creating = (f"$JS.API.STREAM.CREATE.{stream}", f"$JS.API.STREAM.MSG.DELETE.{stream}")
    return Permissions(
        publish=(*reader.publish, f"{dead_letters.ROOT}.>", *creating, *_reading(stream)),
        subscribe=reader.subscribe,
    )


def _reading(*streams: str) -> tuple[str, ...]:
    calls = ("STREAM.INFO.{}", "STREAM.MSG.GET.{}", "CONSUMER.*.{}.>", "CONSUMER.MSG.NEXT.{}.*")
    apis = tuple(f"$JS.API.{call.format(stream)}" for stream in streams for call in calls)
    return (*apis, *(f"$JS.ACK.{stream}.>" for stream in streams))
