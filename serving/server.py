"""What the routes share: the service, its gates, metrics, and how they read and answer."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from engine.bundle import Bundle
from engine.config import LimitsConfig
from engine.deadline import Deadline
from engine.errors import PlexrankError, RequestError
from engine.pipeline import Query
from engine.streaming.events.forward import ForwardingLog
from serving.codec import RankIn, RecommendIn, decode, encode, ids, one_id
from serving.following import Following
from serving.limits import JSON, Gate, media_type, read_body
from serving.metrics import Metrics
from serving.service import Service

T = TypeVar("T")


class Server:
    """One application's parts. Rankings and events wait apart: a slow disk does not hold a ranking."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        limits = self.limits
        shed = metrics.shed.inc
        self.rankings = Gate("explain", threads=limits.threads, waiting=limits.queue, refused=shed)
        self.events = Gate("events", threads=4, waiting=limits.queue, refused=shed)
        self.chores = Gate("chores", threads=2, waiting=16, refused=shed)
        bundle = service.pipeline.served.bundle
        metrics.serves(bundle.name, bundle.version)
        if isinstance(service.log, ForwardingLog):
            service.log.observe = metrics.lag.labels("forward").observe
        self.following: Following | None = None
        if service.registry is not None:
            self.following = Following(service, service.registry, self._swapped, metrics.applied)
            self.following.start()

    @property
    def limits(self) -> LimitsConfig:
        return self.service.config.limits

    def load(self, name: str | None = None) -> Bundle:
        """Another bundle serves, or the same one read again; counted either way."""
        try:
            bundle = self.service.load(name)
        except PlexrankError:
            self.metrics.swaps.labels("refused").inc()
            raise
        self._swapped()
        return bundle

    def _swapped(self) -> None:
        """Another bundle serves."""
        bundle = self.service.pipeline.served.bundle
        self.metrics.swaps.labels("loaded").inc()
        self.metrics.serves(bundle.name, bundle.version)

    def degraded(self) -> list[str]:
        """What of the stream and of scoring does not do all that it should."""
        trouble = None if self.following is None else self.following.trouble
        scoring = [f"rank: {why}" for why in self.service.scorer.degraded()]
        deltas = ["deltas: not followed"] if trouble else []
        items = ["items: not followed"] if self.service.item_tail.trouble else []
        return [*self.service.degraded(), *deltas, *items, *scoring]

    async def body(self, request: Request, kind: type[T]) -> T:
        """The body of a JSON route, within the limits."""
        media_type(request, JSON)
        return decode(await read_body(request, self.limits.body_bytes), kind)

    def query(self, request: Request, asked: RankIn | RecommendIn) -> Query:
        """Who asks and by when, counted from the request's arrival."""
        limits = self.limits
        milliseconds = asked.timeout_ms or _timeout(request) or limits.timeout_ms
        return Query(
            request_id=request.scope["plexrank.request_id"],
            deadline=Deadline(milliseconds / 1e3, request.scope["plexrank.begin"]),
            user="" if asked.user is None else one_id(asked.user, limits, "/user"),
            history=None if asked.history is None else ids(asked.history, limits, "history"),
            features=asked.features,
            context=asked.context,
        )

    def title(self, item: str) -> str:
        """An item's title; its id where the catalogue does not know it."""
        catalogue = self.service.pipeline.served.catalogue
        row = int(catalogue.rows([item])[0])
        return catalogue.title(row) if row >= 0 else item

    def close(self) -> None:
        if self.following is not None:
            self.following.close()
        for gate in (self.rankings, self.events, self.chores):
            gate.close()
        self.service.close()


def _timeout(request: Request) -> int | None:
    """The X-Timeout-Ms header."""
    text = request.headers.get("x-timeout-ms")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 60_000):
        raise RequestError("X-Timeout-Ms is a number of milliseconds from 1 to 60000", status=400)
    return int(text)


def answer(value: Any, status: int = 200) -> Response:
    """A struct as JSON."""
    return Response(value if isinstance(value, bytes) else encode(value), status, media_type="application/json")
