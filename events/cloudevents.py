"""CloudEvents 1.0 in NATS binary mode: attributes are headers, so any CloudEvents consumer can route our
events without knowing the payload, and the payload stays plain JSON of the struct."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

from whimbrel.events.codec import tag_of
from whimbrel.events.subjects import ROOT

if TYPE_CHECKING:
    from whimbrel.events.facts import Event

CONTENT_TYPE = "application/json"


def headers(event: Event) -> dict[str, str]:
    """NATS headers of `event`: the required attributes, `subject` where it belongs to a migration, and
    the extension `cause`. Values are percent-encoded as the NATS binding asks."""
    attributes = {
        "ce-specversion": "1.0",
        "ce-id": event.id,
        "ce-source": f"/whimbrel/hosts/{event.host}",
        "ce-type": f"{ROOT}.{tag_of(event)}",
        "ce-time": datetime.fromtimestamp(event.at, UTC).isoformat().replace("+00:00", "Z"),
        "content-type": CONTENT_TYPE,
    }
    if event.migration is not None:
        attributes["ce-subject"] = event.migration
    if event.cause is not None:
        attributes["ce-cause"] = event.cause
    # Header values are bytes on the wire, and a line break would end the header: nothing foreign gets in.
    return {name: quote(value, safe="!#$&'()*+,/:;=?@[]~-._") for name, value in attributes.items()}
