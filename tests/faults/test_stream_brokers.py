"""The broker goes away, or hangs, under a server that answers and a learner that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.brokers import Broker
from tests.faults.stream_world import (
    Visitors,
    World,
    adds_up,
    decoded,
    each_once,
    liked,
    named,
    never_back,
    trained,
    world,
    zygote,
)

__all__ = ["world", "zygote"]
WAITS = "events: waiting in the local log"


@pytest.mark.parametrize(("name", "fault"), [("kafka09", "killed"), ("tansu", "stopped for a while")])
def test_a_broker_that_is_away_for_a_while_costs_no_event(
    name: str, fault: str, request: pytest.FixtureRequest, world: Callable[..., World]
) -> None:
    """The server answers all along, and says degraded; what waited follows in order; each example is trained once."""
    broker: Broker = request.getfixturevalue(name)
    its = world(broker)
    server, learner = its.serve(), its.learn(publish=True)
    with Visitors(server, "v") as visitors:
        visitors.more(40)
        its.until(lambda: learner.events() > 0, "the learner reads")
        broker.kill() if fault == "killed" else broker.pause()
        try:
            before = len(visitors.answers)
            its.until(lambda: WAITS in visitors.answers[-1]["degraded"], "the server says that events wait")
            visitors.more(60, "the server answers without its log")
            assert WAITS in server.client.get("/health/ready").json()["degraded"]
            assert learner.code is None, learner.said()
        finally:
            broker.start() if fault == "killed" else broker.go_on()
        its.until(lambda: not visitors.answers[-1]["degraded"], "the log is back")
        visitors.more(40)
    assert not visitors.failures
    assert len(visitors.answers) > before + 60
    its.until(
        lambda: (
            server.metric("plexrank_rankings_logged_total") + server.metric("plexrank_rankings_unlogged_total")
            >= len(visitors.answers)
        ),
        "each ranking is on its way to the log",
    )
    its.until(lambda: server.metric("plexrank_events_spooled") == 0, "nothing waits")
    its.consumed([learner])
    summary = learner.end()
    _nothing_lost(its, visitors, summary, unlogged=int(server.metric("plexrank_rankings_unlogged_total")))
    never_back([answer["model"]["version"] for answer in visitors.answers])
    begun = visitors.answers[0]["model"]["version"]
    its.until(lambda: server.client.get("/v1/models").json()["model"]["version"] != begun, "deltas are followed")


def _nothing_lost(its: World, visitors: Visitors, summary: dict[str, Any], unlogged: int) -> None:
    """Answered = in the log = read by the learner; clicked = joined; what was trained was trained once."""
    records = its.records()
    rankings, clicks = decoded(records, "ranking"), decoded(records, "interaction")
    assert [e["id"] for e in clicks if e["data"]["user"] == "u3"] == [
        name for name, _, _ in visitors.clicks if int(name.split("-")[1]) % 7 == 3
    ], "a user's events in the order in which they were answered"
    assert {e["id"] for e in clicks} == {name for name, _, _ in visitors.clicks}
    answered = {answer["request_id"] for answer in visitors.answers}
    assert {e["id"] for e in rankings} <= answered
    assert len(rankings) + unlogged == len(answered)
    assert unlogged == 0
    adds_up(summary)
    assert summary["events"]["in"] == len(records)
    assert summary["events"]["duplicates"] == len(records) - len(rankings) - len(clicks)
    assert summary["events"]["dead"] == 0
    join = summary["join"]
    assert join["liked.positives"] + join["corrections"] == len(visitors.clicks)
    counted = trained(its.audit())
    each_once(counted)
    assert sum(counted.values()) == summary["examples"]["trained"]
    assert liked(counted) == named([(request, item) for _, request, item in visitors.clicks])
