"""POST /v1/rank and POST /v1/recommend."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from engine.pipeline import Answer
from serving.codec import RankIn, RankOut, RecommendIn, encode_answer, ids, rank_columns
from serving.openapi import gives, takes
from serving.server import Server, answer


def router(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["ranking"])
    service, metrics, limits = server.service, server.metrics, server.limits

    def finish(ranked: Answer) -> bytes:
        metrics.ranked(ranked)
        return encode_answer(ranked)

    @routes.post(
        "/rank",
        summary="Order given items for a user",
        description="One user's history is read once, whatever the number of items. Items that the catalogue does not "
        "know are ranked by what is known of them.",
        openapi_extra=takes(RankIn, {"user": "1", "items": ["1", "2", "3"]}),
        responses=gives(RankOut, "Items best first", 413, 415, 422),
    )
    async def rank(request: Request) -> Response:
        asked = await server.body(request, RankIn)
        items, columns = rank_columns(asked, limits)
        query = server.query(request, asked)
        return answer(await server.rankings.follow(partial(service.begin_rank, query, items, columns, finish)))

    @routes.post(
        "/recommend",
        summary="Find items for a user",
        description="Retrieves candidates, leaves out what was seen or excluded, ranks and re-orders.",
        openapi_extra=takes(RecommendIn, {"user": "1", "count": 10}),
        responses=gives(RankOut, "Items best first", 413, 415, 422),
    )
    async def recommend(request: Request) -> Response:
        asked = await server.body(request, RecommendIn)
        exclude = ids(asked.exclude, limits, "exclude")
        query = server.query(request, asked)
        begin = partial(service.begin_recommend, query, asked.count, exclude, finish)
        return answer(await server.rankings.follow(begin))

    return routes
