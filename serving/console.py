"""What the Playground asks of a server: the same service, limits and answers as the routes under `/v1`, in process."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from engine.components import UserState
from engine.deadline import Deadline
from engine.errors import EventError, RequestError
from engine.intake import WAITS
from engine.pipeline import Query
from serving.codec import encode_answer, one_id
from serving.ranking_view import Card, Reason, Receipt
from serving.server import Server

SOURCE = "playground"
_NATURAL = 1000  # names read to put numbers in order of their value
_ATTRIBUTES = 2  # columns of the catalogue shown beside a title
_VALUES = 3  # values shown of an attribute that has several
_CHARACTERS = 60  # of an attribute; a longer one is left out
_PAGE_SECONDS = 1.0  # somebody looks at the page: there is time for a whole answer


class ServerConsole:
    """Fulfils `serving.playground.Console` over a running server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Off the event loop, through the gate of the rankings: a full house refuses the page too."""
        return await self.server.rankings.run(function, *arguments)

    def about(self) -> Mapping[str, str]:
        config = self.server.service.pipeline.served.bundle.config
        parts = {"embedding": config.embedding.name, "ranker": config.ranker.name}
        if config.interest is not None:
            parts = {"interest": config.interest.name, **parts}
        if config.retrieval is not None:
            parts["encoder"] = config.retrieval.encoder.name
        return parts

    def learnt(self) -> str | None:
        """Of the scorer, deltas included; None without a registry."""
        return None if self.server.following is None else self.server.service.scorer.version

    def users(self, prefix: str, limit: int) -> Sequence[UserState]:
        """The first of the users whose id begins so, 2 before 10; without the feature that repeats the id."""
        service = self.server.service
        names = sorted(service.users(_NATURAL, prefix), key=lambda name: (len(name) if name.isdigit() else 0, name))
        schema = service.pipeline.served.schema
        ids = {f.name for f in schema.features if f.column == schema.user}
        states = [service.user(name) for name in names[:limit]]
        for state in states:
            state.features = {name: value for name, value in state.features.items() if name not in ids}
        return states

    def user(self, user: str) -> UserState:
        return self.server.service.user(user)

    def cards(self, ids: Sequence[str]) -> Mapping[str, Card]:
        """Titles and attributes of the items that the catalogue knows."""
        catalogue = self.server.service.pipeline.served.catalogue
        rows = catalogue.rows(ids).tolist()
        known = {item: row for item, row in zip(ids, rows, strict=True) if row >= 0}
        details = self._details(list(known.values()))
        return {
            item: Card(item, catalogue.title(row), detail)
            for (item, row), detail in zip(known.items(), details, strict=True)
        }

    def _details(self, rows: list[int]) -> list[str]:
        """The items' first attributes in words, a line an item."""
        served = self.server.service.pipeline.served
        catalogue = served.catalogue
        separators = {f.column: f.separator for f in served.schema.of_item() if f.kind == "multi"}
        names = [n for n in catalogue.attributes if n not in (catalogue.key, catalogue.title_column)][:_ATTRIBUTES]
        columns = [
            [_words(value, separators.get(name)) for value in catalogue.raw(name, np.array(rows, dtype=np.int64))]
            for name in names
        ]
        return [" · ".join(word for word in words if word) for words in zip(*columns, strict=True)] or [""] * len(rows)

    def recommend(self, user: str, count: int) -> Mapping[str, Any]:
        """The answer of `POST /v1/recommend` with this user and count."""
        service = self.server.service
        query = Query(
            request_id=uuid.uuid4().hex,
            deadline=Deadline(_PAGE_SECONDS),
            user=one_id(user, self.server.limits, "/user"),
        )
        ranked = service.recommend(query, count, [])
        self.server.metrics.ranked(ranked)
        answer: dict[str, Any] = msgspec.json.decode(encode_answer(ranked))
        return answer

    def explain(self, request_id: str, count: int) -> Mapping[str, Reason]:
        found = self.server.service.explanations.explain(request_id, count)
        return {reason.item: Reason(reason.history, reason.sources, reason.rules) for reason in found.reasons}

    def click(self, user: str, item: str, request_id: str) -> Receipt:
        """One event through the same door as `POST /v1/events`. RequestError if it is refused."""
        service = self.server.service
        user = service.check_user(user)
        kind = next(iter(service.config.positive_interactions), "click")
        data = {"type": kind, "user": user, "item": item}
        if request_id:
            data["ranking"] = request_id
        name = uuid.uuid4().hex
        event = {"id": name, "source": SOURCE, "specversion": "1.0", "type": "interaction", "data": data}
        before = len(service.user(user).history)
        received = service.receive([msgspec.json.encode(event)])
        self.server.metrics.received(received)
        receipt = received.receipts[0]
        if receipt.status == "refused":
            raise RequestError(receipt.error or "the event was refused")
        failed = [part for part in received.degraded if part != WAITS]
        if failed:
            raise EventError(f"the event is durable, but not yet in the history ({', '.join(failed)})")
        state = service.user(user)
        return Receipt(
            id=name,
            type=kind,
            user=user,
            item=self.cards([item]).get(item) or Card(item, item),
            time=state.times[0] if state.times else 0,
            place="" if receipt.partition is None else f"{receipt.partition}:{receipt.offset}",
            history_before=before,
            history_after=len(state.history),
        )


def _words(value: Any, separator: str | None) -> str:
    """An attribute as people read it."""
    if value is None:
        return ""
    values = value if isinstance(value, list) else str(value).split(separator) if separator else [value]
    text = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values[:_VALUES])
    return text if len(text) <= _CHARACTERS else ""
