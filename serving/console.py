"""The server behind the page: the page's calls go the way of the routes, without the network."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.components import UserState
from engine.deadline import Deadline
from engine.errors import EventError, RequestError
from engine.pipeline import Query
from serving.codec import encode, encode_answer
from serving.server import Server
from serving.view import Card, Reason, Receipt

_DETAIL_COLUMNS = 3
_PAGE_SECONDS = 1.0
"""Somebody looks at the page: there is time for a whole answer."""


class ServerConsole:
    """Fulfils `serving.playground.Console`."""

    def __init__(self, server: Server) -> None:
        self._server, self._service = server, server.service

    def about(self) -> Mapping[str, str]:
        """Part -> plugin, and the model's name and version."""
        bundle = self._service.pipeline.served.bundle
        config, serving = bundle.config, self._service.config
        parts = {
            "model": f"{bundle.name} {bundle.version}",
            "embedding": config.embedding.name,
            "interest": config.interest.name if config.interest else "none",
            "ranker": config.ranker.name,
            "sources": ", ".join(use.name for use in serving.sources),
            "rerankers": ", ".join(use.name for use in serving.rerankers),
        }
        return {part: name for part, name in parts.items() if name}

    def users(self, prefix: str, limit: int) -> Sequence[UserState]:
        store = self._service.store
        return [store.get(user) for user in store.users(limit, prefix)]

    def user(self, user: str) -> UserState:
        return self._service.store.get(user)

    def cards(self, ids: Sequence[str]) -> Mapping[str, Card]:
        """Title and the first attributes of the items that the catalogue knows."""
        catalogue = self._service.pipeline.served.catalogue
        names = [n for n in catalogue.table.column_names if n not in (catalogue.key, catalogue.title_column)]
        cards = {}
        for item, row in zip(ids, catalogue.rows(ids).tolist(), strict=True):
            if row >= 0:
                values = [catalogue.table.column(name)[row].as_py() for name in names[:_DETAIL_COLUMNS]]
                cards[item] = Card(item, catalogue.title(row), " · ".join(_words(v) for v in values if v is not None))
        return cards

    async def recommend(self, user: str, count: int) -> Mapping[str, Any]:
        query = Query(uuid.uuid4().hex, Deadline(_PAGE_SECONDS), self._service.check_user(user))
        answer = await self._server.rankings.run(self._service.recommend, query, count, ())
        self._server.metrics.ranked(answer)
        found: dict[str, Any] = msgspec.json.decode(encode_answer(answer))
        return found

    async def explain(self, request_id: str) -> Mapping[str, Reason]:
        explanation = await self._server.rankings.run(self._service.explanations.explain, request_id, 200)
        return {r.item: Reason(r.history, r.sources, r.rules) for r in explanation.reasons}

    async def click(self, user: str, item: str, request_id: str) -> Receipt:
        data = {"type": "click", "user": self._service.check_user(user), "item": item}
        if request_id:
            data["ranking"] = request_id
        name = uuid.uuid4().hex
        event = {"id": name, "source": "playground", "specversion": "1.0", "type": "interaction", "data": data}
        before = len(self._service.store.get(user).history)
        received = await self._server.events.run(self._service.receive, [encode(event)])
        self._server.metrics.received(received)
        receipt = received.receipts[0]
        if receipt.status == "refused":
            raise RequestError(receipt.error or "refused")
        if received.degraded:
            raise EventError(f"the event is in the log, but the history did not change: {', '.join(received.degraded)}")
        after = len(self._service.store.get(user).history)
        card = self.cards([item]).get(item) or Card(item, item)
        return Receipt(name, "click", user, card, int(time.time()), before, after)


def _words(value: Any) -> str:
    """An attribute as people read it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", ", ")
