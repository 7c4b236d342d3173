"""What the server logs is what a learner needs: clicks join to it, and examples read as the scorer read them."""

from __future__ import annotations

import time
import uuid
from typing import Any

import numpy as np
import torch

from engine.components import ScoreRequest
from engine.config_learning import JoinConfig
from engine.events import EventLimits
from engine.streaming.events.decode import decode_records
from engine.streaming.join.join import Joiner
from engine.streaming.join.pending import PendingExamples

ITEMS = [str(n) for n in range(30)]


def test_clicks_join_the_servers_own_rankings_and_the_examples_are_as_served(server: Any) -> None:
    service = server.service
    bundle = service.pipeline.served.bundle
    assert service.rankings.flush()
    begin = service.log.ends()[0]
    scored: dict[tuple[str, str], float] = {}
    asked = []
    for user in ("u7", "u8", f"new-{uuid.uuid4().hex}", ""):
        body: dict[str, Any] = {"items": ITEMS, "item_features": {"year": [None] * 29 + [2050]}}
        answer = server.client.post("/v1/rank", json=body | ({"user": user} if user else {})).json()
        asked.append(answer["request_id"])
        scored |= {(answer["request_id"], item["id"]): item["score"] for item in answer["items"]}
        assert service.rankings.flush()
        server.click(user or answer["request_id"], "12", uuid.uuid4().hex, ranking=answer["request_id"])
        # what is known of the user changes after the answer: the example is still as it was served
        server.click(user or answer["request_id"], "3", uuid.uuid4().hex)
    records = list(service.log.read({0: begin}, 1000))
    decoded = decode_records(records, EventLimits(), time.time(), 300.0)
    assert decoded.dead == []
    assert [data.request_id for data in decoded.rankings.data] == asked
    joiner = Joiner(["liked"], {"liked": ["click"]}, JoinConfig(), 1)
    pending = PendingExamples(bundle.encoder, bundle.catalogue)
    shown = pending.add(decoded.rankings)
    assert shown.refused == {}
    clicked = joiner.add(decoded.rankings, decoded.interactions, shown)
    assert (joiner.counts["joined"], joiner.counts["unattributed"]) == (4, 4)
    ended = joiner.advance(time.time() + 1e6)
    assert len(clicked.slot) == 4
    assert (clicked.labels == 1).all()
    assert len(ended.slot) == 4 * 29
    assert (ended.labels == 0).all()
    # slots are in the order of the events' items: each example's score is the one that was answered
    slots = np.arange(4 * 30)
    model = bundle.model(service.plugins).eval()
    with torch.inference_mode():
        logits = model(pending.take(slots))["liked"].numpy()
    again = bundle.calibration["liked"].apply(logits)
    items = [(data.request_id, str(item.id)) for data in decoded.rankings.data for item in data.items]
    np.testing.assert_allclose(again, [scored[pair] for pair in items], atol=1e-6)


def test_the_same_request_gives_the_logged_scores_in_process(server: Any) -> None:
    """The reference of the test above: the scorer, asked with the values of the event."""
    answer = server.client.post("/v1/rank", json={"user": "u9", "items": ITEMS}).json()
    assert server.service.rankings.flush()
    records = [r for r in server.service.log.read({0: 0}, 100_000) if r.value]
    rankings = decode_records(records, EventLimits(), time.time(), 300.0).rankings
    data = next(data for data in rankings.data if data.request_id == answer["request_id"])
    ids = [str(item.id) for item in data.items]
    request = ScoreRequest(data.user_features or {}, {"item_id": [str(i) for i in data.history or []]}, ids)
    scores = server.service.scorer.score(request).tasks["liked"]
    np.testing.assert_allclose(scores, [item.score for item in data.items], atol=1e-6)
