"""Servers on one log end with the same items, whoever an event was posted to, and apply each event once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.components import LogRecord
from engine.events import Event, EventLimits, ItemData, decode_event
from engine.streaming.events.item_tail import ItemTail, Place, learnt_place, may_be_item
from tests.streaming.chain_world import wait_for
from tests.streaming.memory_log import MemoryLog

LIMITS = EventLimits()


def item(name: str, id_: str, **features: Any) -> Event:
    data = {"item": name, "features": features}
    document = {"id": id_, "source": "shop", "specversion": "1.0", "type": "item", "data": data}
    return decode_event(json.dumps(document).encode(), LIMITS)


def click(id_: str) -> tuple[str, bytes]:
    data = {"type": "click", "user": "u1", "item": "7"}
    return "u1", json.dumps({"id": id_, "source": "shop", "type": "interaction", "data": data}).encode()


class Shelf:
    """Items as a server has them, and every event that was applied."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Any]] = {}
        self.applied: list[str] = []
        self.kept = threading.Event()
        self.keeps = True

    def add_events(self, events: Iterable[Event]) -> None:
        for event in events:
            assert isinstance(event.data, ItemData)
            self.items.setdefault(str(event.data.item), {}).update(event.data.features)
            self.applied.append(event.id)

    def keep(self, timeout: float) -> bool:
        self.kept.set()
        return self.keeps


class Server:
    def __init__(self, log: MemoryLog, folder: Path, learnt: Place | None = None) -> None:
        self.log, self.shelf = log, Shelf()
        self.tail = ItemTail(log, self.shelf, folder, learnt=learnt)

    def post(self, *events: Event) -> None:
        """As the server's intake does: durable, then applied."""
        self.log.append([(event.key, event.value) for event in events])
        self.tail.own(events)


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog(partitions=3)


@pytest.fixture
def servers(log: MemoryLog, tmp_path: Path) -> Iterator[list[Server]]:
    made = [Server(log, tmp_path / f"place-{n}") for n in range(2)]
    for server in made:
        server.tail.start()
    yield made
    for server in made:
        server.tail.close()


def met(server: Server, count: int) -> None:
    """So many events of others were taken."""
    wait_for(lambda: server.tail.taken == count, f"{count} events of others, they are {server.tail.taken}")


def test_an_item_that_is_posted_to_one_server_reaches_the_others_once(servers: list[Server], log: MemoryLog) -> None:
    one, two = servers
    one.post(item("film", "a", year=1999))
    met(two, 1)
    log.append([click(f"c{n}") for n in range(50)])
    two.post(item("other", "b", year=2001))
    met(one, 1)
    wait_for(lambda: one.tail.lag == two.tail.lag == 0, "both are at the end")
    assert one.shelf.items == two.shelf.items == {"film": {"year": 1999}, "other": {"year": 2001}}
    assert one.shelf.applied == two.shelf.applied == ["a", "b"]


def test_an_event_that_is_twice_in_the_log_is_applied_once(servers: list[Server], log: MemoryLog) -> None:
    event = item("film", "a", year=1999)
    servers[0].post(event)
    log.append([(event.key, event.value)] * 3)
    servers[0].post(item("film", "end"))
    met(servers[1], 2)
    assert servers[0].shelf.applied == servers[1].shelf.applied == ["a", "end"]


def test_the_logs_order_decides_between_servers(log: MemoryLog, tmp_path: Path) -> None:
    """Another's event stands before the own one, and is met after the own one was applied."""
    server = Server(log, tmp_path / "place")
    before, own = item("film", "b", year=1, title="B"), item("film", "a", year=2)
    log.append([(before.key, before.value)])
    server.post(own)
    assert server.shelf.items["film"] == {"year": 2}
    server.tail.take(log.records)
    assert server.shelf.items["film"] == {"year": 2, "title": "B"}
    assert server.shelf.applied == ["a", "b", "a"]


def test_two_posts_at_once_end_as_the_log_has_them(log: MemoryLog, tmp_path: Path) -> None:
    server = Server(log, tmp_path / "place")
    first, second = item("film", "a", year=1), item("film", "b", year=2)
    log.append([(event.key, event.value) for event in (first, second)])
    server.tail.own([second])
    server.tail.own([first])
    server.tail.take(log.records)
    assert server.shelf.items["film"] == {"year": 2}


def test_an_own_event_that_the_thread_met_first_is_not_applied_again(log: MemoryLog, tmp_path: Path) -> None:
    server = Server(log, tmp_path / "place")
    own, after = item("film", "a", year=1), item("film", "b", year=2)
    log.append([(own.key, own.value), (after.key, after.value)])
    server.tail.take(log.records)
    server.tail.own([own])
    assert server.shelf.items["film"] == {"year": 2}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from("xyz"), st.sampled_from("pq"), st.integers(0, 9)), max_size=30
    ),
    st.data(),
)
def test_servers_end_with_what_the_log_says_however_they_are_interleaved(
    posts: list[tuple[int, str, str, int]], data: st.DataObject
) -> None:
    """Each server reads on at moments of its own, also between an append and what follows it."""
    log = MemoryLog(partitions=2)
    servers = [Server(log, Path("unused")) for _ in range(3)]
    read = [0, 0, 0]
    appended: list[LogRecord] = []

    def read_on(number: int) -> None:
        servers[number].tail.take(appended[read[number] :])
        read[number] = len(appended)

    for n, (who, name, feature, value) in enumerate(posts):
        event = item(name, f"e{n}", **{feature: value})
        log.append([(event.key, event.value)])
        appended.append(LogRecord(0, n, event.key, event.value))
        for number in data.draw(st.lists(st.integers(0, 2), max_size=2)):
            read_on(number)
        servers[who].tail.own([event])
    truth: dict[str, dict[str, int]] = {}
    for _, name, feature, value in posts:
        truth.setdefault(name, {})[feature] = value
    for number, server in enumerate(servers):
        read_on(number)
        assert server.shelf.items == truth


def test_a_server_goes_on_behind_what_it_has_kept(log: MemoryLog, tmp_path: Path) -> None:
    first = Server(log, tmp_path / "place")
    first.tail.start()
    event = item("film", "a", year=1)
    log.append([(event.key, event.value)])
    met(first, 1)
    first.tail.close()
    late = item("film", "b", year=2)
    log.append([(late.key, late.value)])
    second = Server(log, tmp_path / "place")
    second.tail.start()
    met(second, 1)
    second.tail.close()
    assert second.shelf.applied == ["b"]


def test_the_place_does_not_move_before_what_lies_before_it_is_kept(log: MemoryLog, tmp_path: Path) -> None:
    server = Server(log, tmp_path / "place")
    server.shelf.keeps = False
    server.tail.start()
    event = item("film", "a", year=1)
    log.append([(event.key, event.value)])
    met(server, 1)
    server.tail.close()
    assert server.shelf.kept.is_set()
    assert not (tmp_path / "place").exists()


def test_a_new_server_begins_where_its_bundle_was_learnt_up_to_and_goes_back_for_another_bundle(
    tmp_path: Path,
) -> None:
    log = MemoryLog()
    for n in range(6):
        event = item(f"film{n}", f"e{n}", year=n)
        log.append([(event.key, event.value)])
    server = Server(log, tmp_path / "place", Place(log.identity, {0: 4}))
    server.tail.start()
    met(server, 2)
    assert server.shelf.applied == ["e4", "e5"]
    server.tail.serves(Place(log.identity, {0: 2}))
    met(server, 4)
    assert server.shelf.applied == ["e4", "e5", "e2", "e3"]
    server.tail.serves(Place(log.identity, {0: 5}))
    server.tail.serves(None)
    met(server, 6)
    server.tail.close()
    again = Server(log, tmp_path / "place")
    again.tail.start()
    again.tail.serves(None)
    log.append([click("c")])
    wait_for(lambda: again.tail._at == {0: 7}, "it is at the end")
    again.tail.close()
    assert again.shelf.applied == []


def test_positions_of_another_log_and_a_damaged_file_mean_the_beginning(tmp_path: Path) -> None:
    for number, kept in enumerate((b'{"log": "other", "positions": {"0": 1}}', b"{", b'{"log": 3}')):
        log = MemoryLog()
        event = item("film", "a", year=1)
        log.append([(event.key, event.value)])
        (tmp_path / f"place-{number}").write_bytes(kept)
        server = Server(log, tmp_path / f"place-{number}", Place("another", {0: 1}))
        server.tail.start()
        met(server, 1)
        server.tail.close()


def test_a_log_that_is_down_is_waited_for_and_one_that_was_cut_read_from_its_oldest(tmp_path: Path) -> None:
    log = MemoryLog()
    server = Server(log, tmp_path / "place")
    log.down()
    server.tail.start()
    wait_for(lambda: server.tail.trouble is not None, "it says why it does not follow")
    log.down(False)
    event = item("film", "a", year=1)
    log.append([(event.key, event.value)])
    met(server, 1)
    assert server.tail.trouble is None
    log.down()
    wait_for(lambda: server.tail.trouble is not None, "it is down again")
    log.down(False)
    late = item("film", "b", year=2)
    log.append([click(f"c{n}") for n in range(5)] + [(late.key, late.value)])
    log.trim(0, 5)
    met(server, 2)
    server.tail.close()


# ------------------------------------------------------------------------------------------- a look at the bytes
@pytest.mark.parametrize(
    ("value", "headers", "expected"),
    [
        (b'{"type":"item","data":{}}', (), True),
        (b'{"type" :\n "com.shop.item"}', (), True),
        (b'{"type":"\\u0069tem"}', (), True),
        (b'{"type":"interaction","data":{"item":"7"}}', (), False),
        (b'{"type":"ranking","data":{"items":[{"id":"item"}]}}', (), False),
        (b"", (), False),
        (b'{"item":"7"}', (("ce_type", b"item"),), True),
        (b'{"item":"7"}', (("ce_type", b"com.shop.item"),), True),
        (b'{"type":"item"}', (("ce_type", b"interaction"),), False),
    ],
)
def test_only_item_events_are_decoded(value: bytes, headers: tuple[tuple[str, bytes], ...], expected: bool) -> None:
    assert may_be_item(LogRecord(0, 0, "k", value, None, headers)) is expected


def test_an_event_in_binary_mode_is_taken(tmp_path: Path) -> None:
    log = MemoryLog()
    server = Server(log, tmp_path / "place")
    names = {"id": "a", "source": "shop", "specversion": "1.0", "type": "item"}
    headers = tuple((f"ce_{name}", value.encode()) for name, value in names.items())
    log.append([("k", b'{"item": "film", "features": {"year": 3}}')], [headers])
    server.tail.take(log.records)
    assert server.shelf.items == {"film": {"year": 3}}


def test_what_a_bundle_says_of_where_it_was_learnt_up_to() -> None:
    assert learnt_place({"learning": {"stream": "kafka:x", "positions": {"0": 3}}}) == Place("kafka:x", {0: 3})
    for figures in (
        {},
        {"learning": None},
        {"learning": {"stream": "x"}},
        {"learning": {"stream": 1, "positions": {}}},
    ):
        assert learnt_place(figures) is None
