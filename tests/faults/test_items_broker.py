"""Two servers on one topic of a real broker: what one is told of items, both answer with."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_serving_server import models

from engine.config import ServingConfig
from serving.service import Service
from tests.brokers import Broker

__all__ = ["models"]


def until(true: Callable[[], Any], what: str) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    pytest.fail(f"not within a minute: {what}")


@pytest.fixture
def opened(models: Path, tmp_path: Path) -> Iterator[Callable[[Broker, str, str], Service]]:
    services: list[Service] = []

    def open_(broker: Broker, topic: str, name: str) -> Service:
        options = {**broker.options, "topic": topic, "partitions": 2, "timeout_ms": 2000}
        config = ServingConfig.model_validate({"event_log": {"name": "kafka", "options": options}})
        services.append(Service.open(models / "tiny", config, tmp_path / name))
        return services[-1]

    yield open_
    for service in services:
        service.close()


def say(service: Service, item: str, id_: str, **features: Any) -> None:
    data = {"item": item, "features": features}
    event = {"id": id_, "source": "shop", "specversion": "1.0", "type": "item", "data": data}
    (receipt,) = service.receive([json.dumps(event).encode()]).receipts
    assert receipt.status == "accepted", receipt.error


def counted(service: Service) -> list[str]:
    """The items of the events that it applies from now on."""
    add, added = service.items.add, []

    def counting(item: Any, features: Any, seconds: float) -> None:
        added.append(str(item))
        add(item, features, seconds)

    service.items.add = counting  # type: ignore[method-assign]
    return added


def title(service: Service, item: str) -> str | None:
    catalogue = service.pipeline.served.catalogue
    row = int(catalogue.rows([item])[0])
    return None if row < 0 else catalogue.title(row)


@pytest.mark.parametrize("name", ["tansu", "kafka09"])
def test_items_reach_every_server_of_the_topic_and_those_that_start_later(
    name: str, request: pytest.FixtureRequest, opened: Callable[[Broker, str, str], Service]
) -> None:
    broker: Broker = request.getfixturevalue(name)
    topic = f"items-{uuid.uuid4().hex[:12]}"
    broker.make_topic(topic, 2)
    one, two = opened(broker, topic, "one"), opened(broker, topic, "two")
    added = {service: counted(service) for service in (one, two)}
    say(one, "new-1", "a", title="First", year=1999)
    say(two, "new-2", "b", title="Second", year=2001)
    for service in (one, two):
        until(lambda service=service: title(service, "new-1") == "First", "the first item")
        until(lambda service=service: title(service, "new-2") == "Second", "the second item")
    say(two, "new-1", "c", title="First, again")
    until(lambda: title(one, "new-1") == "First, again", "the change")
    say(one, "end", "d", title="End")
    until(lambda: title(two, "end") == "End", "the last item")
    until(lambda: not one.item_tail.own_open, "the first server has met its own one in the topic")
    assert [sorted(its) for its in added.values()] == [["end", "new-1", "new-1", "new-2"]] * 2, "each event once"
    late = opened(broker, topic, "late")
    until(lambda: (title(late, "new-1"), title(late, "new-2")) == ("First, again", "Second"), "both, from the topic")
    until(lambda: not late.item_tail.trouble, "nothing is wrong")
