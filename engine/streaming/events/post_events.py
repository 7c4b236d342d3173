"""Sends events to a server, which writes its own log: for a log in a folder, that only one process may write."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

from engine.errors import ConfigError, EventError, LogUnavailable

_TRIES = 20
_SECONDS = 30.0


class EventPoster:
    """`POST /v1/events` of one server. token: sent as a bearer token."""

    def __init__(self, server: str, token: str | None = None) -> None:
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"'{server}' is no server: say it as in http://127.0.0.1:8080")
        self._url = f"{server.rstrip('/')}/v1/events"
        self._headers = {"content-type": "application/x-ndjson"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"

    def send(self, events: Sequence[bytes]) -> Counter[str]:
        """CloudEvents, a JSON object each -> how many were accepted, duplicate, refused.

        Waits while the server is busy. LogUnavailable where it does not take them; EventError where it never will.
        """
        request = urllib.request.Request(self._url, b"\n".join(events), self._headers)  # noqa: S310
        for turn in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310
                    return Counter(receipt["status"] for receipt in json.loads(answer.read())["events"])
            except urllib.error.HTTPError as error:
                if error.code == 422:
                    return Counter(refused=len(events))
                if error.code != 503 or turn == _TRIES - 1:
                    raise EventError(f"{self._url}: {error.code}: {_detail(error)}") from None
                time.sleep(min(float(error.headers.get("retry-after") or 1), 5.0))
            except (OSError, ValueError, KeyError) as error:
                raise LogUnavailable(f"{self._url}: {error}") from None
        raise AssertionError("the last turn raises")


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read()).get("detail", ""))[:300]
    except (ValueError, AttributeError, OSError):
        return error.reason
