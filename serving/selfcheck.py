"""Whether a served model does what it is for, seen from outside: real HTTP requests, as a stranger would send them."""

from __future__ import annotations

import json
import statistics
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

COUNT = 20
RANKED = 200
REQUESTS = 60


@dataclass(frozen=True)
class Check:
    """One promise, whether it was kept, and what was seen."""

    name: str
    passed: bool
    seen: str


class Client:
    """A server's JSON routes. Errors of HTTP and of the network become `Failed`."""

    def __init__(self, base: str, timeout: float = 10.0) -> None:
        self.base, self.timeout = base, timeout

    def text(self, path: str, body: Any = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310
            self.base + path, data, {"content-type": "application/json"} if data else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:  # noqa: S310
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            raise Failed(f"{path}: status {error.code}: {error.read().decode(errors='replace')[:200]}") from error
        except OSError as error:
            raise Failed(f"{path}: {error}") from error

    def json(self, path: str, body: Any = None) -> Any:
        return json.loads(self.text(path, body))


class Failed(Exception):
    """A request without a good answer."""


def wait_until_ready(client: Client, seconds: float = 30.0) -> float:
    """Asks /health/ready until it says yes -> milliseconds of the scoring it did; Failed after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            return float(client.json("/health/ready")["took_ms"])
        except Failed:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def time_ranking(client: Client, user: str, items: list[str]) -> tuple[float, float]:
    """p50 and p99 of POST /v1/rank in milliseconds, over HTTP, one request at a time."""
    took = []
    for _ in range(REQUESTS):
        start = time.perf_counter()
        client.json("/v1/rank", {"user": user, "items": items[:RANKED], "timeout_ms": 5000})
        took.append(1e3 * (time.perf_counter() - start))
    took.sort()
    return statistics.median(took), took[int(0.99 * (len(took) - 1))]


def check(client: Client, user: str) -> Iterator[Check]:
    """Ranks, sends a click on an item from the middle of the list, and looks at what became of it."""
    before = after = None
    clicked = ""
    recommend = {"user": user, "count": COUNT, "timeout_ms": 5000}

    def rank() -> str:
        nonlocal before, clicked
        before = client.json("/v1/recommend", recommend)
        clicked = before["items"][len(before["items"]) // 2]["id"]
        _need(len(before["items"]) == COUNT, f"{len(before['items'])} items")
        _need(not before["degraded"], f"degraded: {before['degraded']}")
        return f"{COUNT} items in {before['took_ms']:.1f} ms"

    def click() -> str:
        data = {"type": "click", "user": user, "item": clicked, "ranking": _known(before)["request_id"]}
        event = {
            "id": uuid.uuid4().hex,
            "source": "selfcheck",
            "specversion": "1.0",
            "type": "interaction",
            "data": data,
        }
        receipt = client.json("/v1/events", event)["events"][0]
        _need(receipt["status"] == "accepted", str(receipt))
        return f"partition {receipt['partition']}, offset {receipt['offset']}"

    def history() -> str:
        newest = client.json(f"/v1/users/{quote(user, safe='')}")["history"][0]
        _need(newest["item"] == clicked, f"newest is {newest['item']}, not {clicked}")
        return f"newest: {newest['title']}"

    def order() -> str:
        nonlocal after
        after = client.json("/v1/recommend", recommend)
        old = [item["id"] for item in _known(before)["items"]]
        new = [item["id"] for item in after["items"]]
        _need(clicked not in new, "the clicked item is still recommended")
        kept = [item for item in old if item in new]
        moved = sum(a != b for a, b in zip(kept, [item for item in new if item in old], strict=True))
        fresh = len(set(new) - set(old))
        _need(moved + fresh > 1, "nothing moved")
        return f"{moved} moved, {fresh} new"

    def why() -> str:
        reasons = client.json(f"/v1/explain/{_known(after)['request_id']}?history=1000")["items"]
        weighed = {past["item"] for reason in reasons for past in reason["history"]}
        _need(clicked in weighed, "the click does not weigh")
        return f"{len(weighed)} history items weigh in {len(reasons)} reasons"

    def page() -> str:
        html = client.text(f"/?user={quote(user, safe='')}")
        _need('id="ranking-title"' in html, "the page shows no ranking")
        return f"{len(html) // 1024} KiB"

    yield _tried("a ranking is answered", rank)
    yield _tried("a click is durable in the log", click)
    yield _tried("the history begins with it", history)
    yield _tried("the next ranking differs", order)
    yield _tried("the click is among the reasons", why)
    yield _tried("the page shows the user", page)


def _tried(name: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name, True, step())
    except Failed as failure:
        return Check(name, False, str(failure))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return Check(name, False, f"an answer of another shape: {type(error).__name__}: {error}")


def _need(true: bool, otherwise: str) -> None:
    if not true:
        raise Failed(otherwise)


def _known(answer: Any) -> Any:
    if answer is None:
        raise Failed("there is no ranking to go on from")
    return answer
