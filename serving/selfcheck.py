"""Whether a served model does what it is for, seen from outside: real HTTP requests, as a stranger would send them."""

from __future__ import annotations

import json
import math
import statistics
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

COUNT = 20
RANKED = 200
REQUESTS = 60
SCORED = 5
"""Items whose scores are compared before and after a click was learnt."""
LEARNT_SECONDS = 20.0
"""Longest wait for it."""
_QUIET_SECONDS = 0.6


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
        receipt = _click(client, user, clicked, _known(before)["request_id"], time.time())
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


def learning(client: Client, user: str) -> Iterator[Check]:
    """Sends a click and looks whether a learner beside the server learns it: what serves then is another version.

    The server is taken to have no other visitors.
    """
    then: dict[str, Any] = {}
    learnt: str | None = None

    def learn() -> str:
        nonlocal learnt
        _following(client)
        _quiet(client)
        ranked = client.json("/v1/recommend", {"user": user, "count": COUNT, "timeout_ms": 5000})
        shown = [item["id"] for item in ranked["items"]]
        clicked = shown[len(shown) // 2]
        past = [past["item"] for past in client.json(f"/v1/users/{quote(user, safe='')}")["history"]]
        others = [item for item in shown if item != clicked]
        asked = {"user": user, "items": [clicked, *others[: SCORED - 1]], "history": past, "timeout_ms": 5000}
        then.update(clicked=clicked, asked=asked, scores=_scores(client, asked))
        before, (_, newest) = client.json("/v1/models"), _newest_learnt(client)
        posted, start = time.time(), time.perf_counter()
        _click(client, user, clicked, ranked["request_id"], posted)
        while True:
            least, most = _newest_learnt(client)
            if least > newest and most >= posted:
                break
            if time.perf_counter() - start > LEARNT_SECONDS:
                trouble = _following(client)["trouble"]
                raise Failed(f"not learnt in {LEARNT_SECONDS:.0f} s ({trouble or 'the server follows, nothing came'})")
            time.sleep(0.005)
        took = time.perf_counter() - start
        learnt = client.json("/v1/models")["model"]["version"]
        return f"in {1e3 * took:.0f} ms; version {before['model']['version']} became {learnt}"

    def scores() -> str:
        now = _scores(client, _known(then.get("asked")))
        item, was = then["clicked"], then["scores"]
        changed = sum(now[name] != was[name] for name in was)
        _need(now[item] != was[item], "the clicked item has the score that it had")
        moved = f"{was[item]:.4f} -> {now[item]:.4f}"
        return f"{changed} of {len(was)}, with the history as it was before; the clicked one {moved}"

    def follow() -> str:
        answer, about = client.json("/v1/recommend", {"user": user, "count": COUNT}), client.json("/v1/models")
        version, its = answer["model"]["version"], about["following"]
        _need(version.startswith(_known(learnt).rpartition(".")[0]), f"an answer is of version {version}")
        _need(its["gaps"] == 0 and its["errors"] == 0 and its["trouble"] is None, str(its["last_error"] or its))
        _need(not answer["degraded"], f"degraded: {answer['degraded']}")
        return f"{its['applied']} deltas applied, none missed; answers are of version {version}"

    yield _tried("a click is learnt", learn)
    yield _tried("scores changed by it", scores)
    yield _tried("answers follow the learner", follow)


def _click(client: Client, user: str, item: str, ranking: str, seconds: float) -> Any:
    """Sends a click on what a ranking showed, of this time -> its receipt; Failed where it is not accepted."""
    event = {
        "id": uuid.uuid4().hex,
        "source": "selfcheck",
        "specversion": "1.0",
        "type": "interaction",
        "time": datetime.fromtimestamp(seconds, UTC).isoformat(),
        "data": {"type": "click", "user": user, "item": item, "ranking": ranking},
    }
    receipt = client.json("/v1/events", event)["events"][0]
    _need(receipt["status"] == "accepted", str(receipt))
    return receipt


def _following(client: Client) -> Any:
    """What the server says of the deltas; Failed where it follows none."""
    following = client.json("/v1/models")["following"]
    _need(following is not None, "the server follows no learner: it was started without a registry")
    return following


def _newest_learnt(client: Client) -> tuple[float, float]:
    """Between which times (seconds since 1970) the newest event lies that the served version was trained on.

    The server says its age; when it said so lies between the request and its answer.
    """
    least = time.time()
    age = _following(client)["newest_event_age_seconds"]
    return (-math.inf, -math.inf) if age is None else (least - age, time.time() - age)


def _quiet(client: Client) -> None:
    """Waits until no delta has come for a moment, or as long as for a click to be learnt."""
    until = time.monotonic() + LEARNT_SECONDS
    version, since = None, time.monotonic()
    while time.monotonic() < min(until, since + _QUIET_SECONDS):
        found = client.json("/v1/models")["model"]["version"]
        if found != version:
            version, since = found, time.monotonic()
        time.sleep(0.05)


def _scores(client: Client, asked: dict[str, Any]) -> dict[str, float]:
    return {item["id"]: item["score"] for item in client.json("/v1/rank", asked)["items"]}


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
