"""`--webhook`: a POST per event, as CloudEvents in HTTP binary mode, signed where a secret was given."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import aiohttp

from whimbrel.controller.react import signature
from whimbrel.controller.react.action import ActionFailed, ActionRefused
from whimbrel.events import cloudevents, codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.events.facts import AnyEvent

RETRY_AFTER_S_MAX = 300.0
ATTEMPT_HEADER = "Whimbrel-Attempt"
_PASSING = (408, 425, 429)
"""4xx that may be better a moment later; the others are the same until somebody changes something."""
_ANSWER_BYTES_KEPT = 1024


class Webhook:
    """An Action: any 2xx means handled. `session` belongs to the caller."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        deadline_s: float,
        secret: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._session = session
        self._url = url
        self._deadline_s = deadline_s
        self._secret = secret
        self._clock = clock

    @property
    def name(self) -> str:
        # Query and user often are secrets.
        return self._url.split("?")[0].split("#")[0].rpartition("@")[2]

    async def perform(self, event: AnyEvent, attempt: int) -> None:
        """Raises ActionFailed for silence, 5xx, 408, 425 and 429, ActionRefused for any other answer but 2xx.
        Redirects are not followed: the signed body goes nowhere else."""
        body = codec.encode(event)
        headers = {**cloudevents.headers(event), ATTEMPT_HEADER: str(attempt)}
        if self._secret is not None:
            headers[signature.HEADER] = signature.sign(self._secret, body, self._clock())
        try:
            async with self._session.post(
                self._url,
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=self._deadline_s),
            ) as answer:
                if 200 <= answer.status < 300:
                    return
                said = (await answer.content.read(_ANSWER_BYTES_KEPT)).decode(errors="replace").strip()
                reason = f"expected a 2xx answer, found {answer.status} {answer.reason}: {said!r}"
                if answer.status >= 500 or answer.status in _PASSING:
                    raise ActionFailed(reason, retry_after_s=_retry_after(answer.headers.get("Retry-After")))
                raise ActionRefused(reason)
        except TimeoutError:
            raise ActionFailed(f"expected an answer within {self._deadline_s:g} s, heard none") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ActionFailed(f"could not be reached: {error or type(error).__name__}") from error


def _retry_after(value: str | None) -> float | None:
    """Seconds; the form with a date is left to our own backoff."""
    if value is None or not value.isascii() or not value.strip().isdigit():
        return None
    return min(float(value), RETRY_AFTER_S_MAX)
