"""GET /v1/explain/{request_id}."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import Response

from engine.explanations import MOST_ITEMS, Explanation, Reason
from serving.codec import ModelOut
from serving.openapi import gives
from serving.server import Server, answer
from serving.views import ExplainOut, ReasonOut, WeightOut


def router(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["ranking"])

    def reason(found: Reason, most: int) -> ReasonOut:
        heaviest = sorted(found.history, key=lambda pair: -abs(pair[1]))[:most]
        return ReasonOut(
            item=found.item,
            title=server.title(found.item),
            score=found.score,
            position=found.position,
            history=[WeightOut(item, server.title(item), weight) for item, weight in heaviest],
            sources=found.sources,
            rules=found.rules,
        )

    def explain(request_id: str, items: int, most: int) -> ExplainOut:
        e: Explanation = server.service.explanations.explain(request_id, items)
        return ExplainOut(
            e.request_id,
            e.user,
            ModelOut(e.model, e.version),
            e.explained_by,
            e.degraded,
            [reason(found, most) for found in e.reasons],
        )

    @routes.get(
        "/explain/{request_id}",
        summary="Why these items, in this order",
        description="For the newest answers: the weight of each history item in the interest model, the sources that "
        "proposed an item, and the rules that moved it. Computed when asked.",
        responses=gives(ExplainOut, "A reason an item, best first", 404, 409, 422),
    )
    async def explain_route(
        request_id: Annotated[str, Path(max_length=128, description="of the answer")],
        items: Annotated[int, Query(ge=1, le=MOST_ITEMS, description="items explained")] = 20,
        history: Annotated[int, Query(ge=0, le=1000, description="history items named an item")] = 10,
    ) -> Response:
        return answer(await server.rankings.run(explain, request_id, items, history))

    return routes
