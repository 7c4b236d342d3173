"""kill -9 of the learner and of the server, under load."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.brokers import Broker
from tests.faults.stream_world import (
    Visitors,
    World,
    adds_up,
    click,
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


def test_a_learner_that_is_killed_again_and_again_trains_each_event_once_and_deltas_go_on(
    tansu: Broker, world: Callable[..., World]
) -> None:
    its = world(tansu)
    server, learner = its.serve(), its.learn(publish=True)
    with Visitors(server, "v") as visitors:
        for life in range(4):
            version = visitors.answers[-1]["model"]["version"] if visitors.answers else ""
            its.until(
                lambda version=version: visitors.answers and visitors.answers[-1]["model"]["version"] != version,
                f"deltas of life {life} reach the server",
            )
            visitors.more(30)
            if life > 0:
                its.until(lambda: [*(its.folder / "out" / "checkpoints").glob("step-*")], "there is a checkpoint")
            if life < 3:
                learner.signal(signal.SIGKILL)
                assert learner.wait() == -signal.SIGKILL
                learner = its.learn(publish=True)
        followed = server.client.get("/v1/models").json()["following"]
    assert not visitors.failures
    its.consumed([learner])
    summary = learner.end()
    adds_up(summary)
    records = its.records()
    assert summary["events"]["in"] == len(records) == len(visitors.answers) + len(visitors.clicks)
    assert summary["events"]["duplicates"] == summary["events"]["dead"] == 0
    counted = trained(its.audit())
    each_once(counted)
    assert sum(counted.values()) == summary["examples"]["trained"]
    assert liked(counted) == named([(request, item) for _, request, item in visitors.clicks])
    versions = [answer["model"]["version"] for answer in visitors.answers]
    assert never_back(versions) <= 1, "only the first life may have ended without a checkpoint to go on from"
    assert len(set(versions)) > 4
    assert followed["trouble"] is None


def test_a_server_that_is_killed_has_in_the_log_what_it_answered_for_events(
    tansu: Broker, world: Callable[..., World]
) -> None:
    """Events that were answered are in the log. Of the rankings those may be missing that were on their way: the last
    ones. A click on such a one waits for its ranking and is an orphan in the end; all else is joined and trained."""
    its = world(tansu)
    server, learner = its.serve(), its.learn()
    with Visitors(server, "first") as first:
        first.more(60)
        server.signal(signal.SIGKILL)
        its.until(lambda: first.failures, "visitors notice")
    assert server.wait() == -signal.SIGKILL
    server = its.serve()
    user = server.client.get("/v1/users/u1").json()
    clicks = [item for name, _, item in first.clicks if int(name.split("-")[1]) % 7 == 1]
    assert {*clicks} <= {entry["item"] for entry in user["history"]}, "the state goes on where it was"
    again = [click(name, "u1", item, request) for name, request, item in first.clicks[:5]]
    answers = server.client.post("/v1/events", json=again).json()["events"]
    assert {receipt["status"] for receipt in answers} == {"duplicate"}, "the log's tail was replayed"
    with Visitors(server, "second") as second:
        second.more(40)
    its.until(lambda: server.metric("plexrank_rankings_logged_total") >= len(second.answers), "rankings are in the log")
    its.consumed([learner])
    summary = learner.end()

    records = its.records()
    clicked = decoded(records, "interaction")
    sent = [*first.clicks, *second.clicks]
    assert {name for name, _, _ in sent} <= {event["id"] for event in clicked}
    unanswered = len(clicked) - len(sent)
    assert unanswered <= 5, "at most the one request that was cut off"
    logged = {event["id"] for event in decoded(records, "ranking")}
    answered = [answer["request_id"] for answer in first.answers]
    lost = [n for n, request in enumerate(answered) if request not in logged]
    assert {answer["request_id"] for answer in second.answers} <= logged
    assert all(n >= len(answered) - len(lost) - 3 for n in lost), "the last ones"
    assert len(lost) <= 10

    adds_up(summary)
    assert summary["events"]["in"] == len(records)
    assert summary["events"]["dead"] == summary["events"]["duplicates"] == 0
    joined = [(request, item) for _, request, item in sent if request in logged]
    homeless = len(sent) - len(joined)
    join = summary["join"]
    assert homeless <= summary["open"]["interactions"] + join["orphans"] <= homeless + unanswered
    counted = trained(its.audit())
    each_once(counted)
    assert named(joined) <= liked(counted)
    assert len(liked(counted)) == join["liked.positives"] + join["corrections"] <= len(joined) + unanswered
