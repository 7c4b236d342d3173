"""`plexrank events`: what is in the log, given again, and what was refused, while a server writes beside it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.components import EventLog, LogRecord
from engine.events import Reason
from engine.loading import load_config
from engine.plugins import installed
from engine.streaming.dead import Dead, DeadLetters
from engine.streaming.open_log import open_log

CONFIG = """\
name: ads
data:
  source: {interactions: clicks.csv}
  labels: {click: {column: clicked}}
features:
  - {name: user_id, side: user}
  - {name: item_id}
serving:
  event_log: {name: local, options: {partitions: 2, fsync: never}}
"""


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.lines[-1])


class World:
    """A configuration, a state directory, and the log as the server holds it open for writing."""

    def __init__(self, folder: Path, run: Callable[..., Answer]) -> None:
        self.folder, self._run = folder, run
        self.config, self.state = folder / "ads.yaml", folder / "state"
        self.config.write_text(CONFIG)
        self.log = self.open()

    def open(self) -> EventLog:
        return open_log(installed(), load_config(self.config).serving.event_log, self.state)

    def events(self, *arguments: object) -> Answer:
        """`plexrank events COMMAND CONFIG ...` with this state directory."""
        words = list(arguments)
        at = 2 if words[0] == "dead" else 1
        return self._run("events", *words[:at], self.config, "--state-dir", self.state, *words[at:])

    def click(self, n: int, user: str = "u1") -> tuple[int, int]:
        data = {"type": "click", "user": user, "item": str(n), "ranking": f"r{n}"}
        event = {"id": f"e{n}", "source": "t", "specversion": "1.0", "type": "interaction", "data": data}
        event["time"] = f"2026-01-31T12:00:{n % 60:02d}Z"
        return self.log.append([(user, json.dumps(event).encode())])[0]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[World]:
    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["plexrank", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        return Answer(code or 0, *capsys.readouterr())

    made = World(tmp_path, run)
    yield made
    made.log.close()


def ids(answer: Answer) -> list[str]:
    return [json.loads(text)["id"] for text in answer.lines]


# ---------------------------------------------------------------------------------------------------- tail
def test_the_newest_events_are_lines_for_people_while_a_server_writes(world: World) -> None:
    for n in range(30):
        place = world.click(n, f"u{n % 3}")
    answer = world.events("tail", "-n", "3")
    assert answer.code == 0, answer.err
    assert len(answer.lines) == 3
    when, of_day, where, kind, user, *what = answer.lines[-1].split()
    assert (when, of_day) == ("2026-01-31", "12:00:29")
    assert where == "{}:{}".format(*place)
    assert (kind, user, what) == ("interaction", "u2", ["click", "29", "of", "r29", "e29"])


def test_json_has_all_of_a_record(world: World) -> None:
    partition, offset = world.click(7)
    (record,) = [json.loads(text) for text in world.events("tail", "--json").lines]
    assert (record["partition"], record["offset"], record["key"]) == (partition, offset, "u1")
    assert record["event"]["data"]["item"] == "7"
    assert abs(record["seconds"] - time.time()) < 60


def test_headers_and_what_is_no_json_are_shown_too(world: World) -> None:
    headers = (("ce_id", b"b1"), ("ce_type", b"interaction"), ("ce_source", b"t"), ("ce_specversion", b"1.0"))
    world.log.append([("u1", b'{"type": "view", "user": "u1", "item": "9"}')], [headers])
    world.log.append([("u1", b"\xff\x00\x1b[31m")])
    answer = world.events("tail")
    assert "view 9  b1" in answer.lines[0]
    assert "7 bytes" in answer.lines[1]
    assert "\x1b" not in answer.out
    second = json.loads(world.events("tail", "--json").lines[1])
    assert second["bytes"] == "/wAbWzMxbQ=="


def test_a_ranking_says_how_many_and_which(world: World) -> None:
    items = [{"id": str(n)} for n in range(5)]
    data = {"request_id": "r", "user": "u", "items": items, "version": "abc+1.2"}
    event = {"id": "r", "source": "plexrank", "specversion": "1.0", "type": "ranking", "data": data}
    world.log.append([("u", json.dumps(event).encode())])
    assert "5 items: 0, 1, 2, ..., abc+1.2" in world.events("tail").lines[0]


def test_following_shows_what_comes(world: World) -> None:
    world.click(0)
    command = [sys.executable, "-m", "engine", "events", "tail", str(world.config), "--state-dir", str(world.state)]
    child = subprocess.Popen([*command, "--follow", "--json"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["event"]["id"] == "e0"
        threading.Timer(0.2, world.click, (1,)).start()
        assert json.loads(child.stdout.readline())["event"]["id"] == "e1"
    finally:
        child.kill()
        child.wait()


# -------------------------------------------------------------------------------------------------- replay
def test_replay_begins_at_an_offset_a_time_or_the_beginning(world: World) -> None:
    for n in range(6):
        partition, offset = world.click(n)
    assert ids(world.events("replay", "--earliest")) == [f"e{n}" for n in range(6)]
    assert ids(world.events("replay", "--offset", f"{partition}:{offset - 1}")) == ["e4", "e5"]
    assert ids(world.events("replay", "--earliest", "--limit", "2")) == ["e0", "e1"]
    assert ids(world.events("replay", "--time", "2000-01-01T00:00:00Z")) == [f"e{n}" for n in range(6)]
    assert ids(world.events("replay", "--time", "2100-01-01T00:00:00Z")) == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--offset", "0-1"], "'0-1' is no position: say partition:offset"),
        (["--offset", "7:0"], "there is no partition 7"),
        (["--offset", "0:99"], "0:99 is not in the log: it holds 0 up to"),
        (["--time", "yesterday"], "'yesterday' is no time"),
    ],
)
def test_a_beginning_that_is_none_is_named(world: World, arguments: list[str], why: str) -> None:
    answer = world.events("replay", *arguments)
    assert answer.code == 1
    assert why in answer.err
    assert "Traceback" not in answer.err


def test_two_beginnings_are_wrong_usage(world: World) -> None:
    assert world.events("replay").code == 2
    assert world.events("replay", "--earliest", "--time", "2026-01-01").code == 2


def test_replay_into_another_stream_keeps_key_bytes_and_headers(world: World) -> None:
    world.log.append([("u1", b"\xffarrow"), ("u2", b"{}")], [(("content-type", b"x/y"),), ()])
    answer = world.events("replay", "--earliest", "--into", "copy")
    assert answer.code == 0, answer.err
    copy = world.log.sibling("copy")
    found = {record.key: record for partition in copy.ends() for record in copy.read({partition: 0})}
    copy.close()
    assert found["u1"].value == b"\xffarrow"
    assert found["u1"].headers == (("content-type", b"x/y"),)
    assert found["u2"].value == b"{}"


# -------------------------------------------------------------------------------------------------- topics
def test_topics_makes_the_streams_and_lists_them(world: World) -> None:
    for n in range(4):
        partition, _ = world.click(n)
    rows = world.events("topics", "--json").json
    count = {name: sum(row["stream"] == name for row in rows) for name in {row["stream"] for row in rows}}
    assert count == {"events": 2, "dead": 2, "examples": 2, "deltas": 1, "models": 1}
    by_place = {(row["stream"], row["partition"]): row for row in rows}
    assert by_place["events", partition] == {
        "stream": "events",
        "partition": partition,
        "begin": 0,
        "end": 4,
        "age": pytest.approx(0, abs=60),
    }
    assert by_place["deltas", 0]["age"] is None
    assert "examples" in world.events("topics").out


def test_topics_begins_a_log_that_is_not_there_yet(world: World) -> None:
    answer = world.events("topics", "--state-dir", str(world.folder / "new"), "--json")
    assert answer.code == 0, answer.err
    assert [row["end"] for row in answer.json] == [0] * 8


# ---------------------------------------------------------------------------------------------------- dead
def bury(world: World, *values: bytes) -> list[tuple[int, int]]:
    """Refused events in the log, and their letters."""
    places = world.log.append([("u1", value) for value in values])
    letters = DeadLetters(world.log)
    letters.write(
        [
            Dead.of(LogRecord(p, o, "u1", value), Reason.JSON, f"not JSON: {value!r}")
            for (p, o), value in zip(places, values, strict=True)
        ]
    )
    found = [letter.place for letter in letters.list()]
    letters.close()
    return found


def test_refused_events_are_listed_shown_and_sent_again_once(world: World) -> None:
    first, second = bury(world, b"{broken", b"\x1b[31mred")
    listed = world.events("dead", "list", "--json").json
    assert [row["reason"] for row in listed] == ["json", "json"]
    assert listed[0]["value"] == "{broken"
    assert world.events("dead", "list", "--reason", "schema", "--json").json == []
    shown = world.events("dead", "show", "{}:{}".format(*second))
    assert "\\x1b[31mred" in shown.out
    assert "\x1b" not in shown.out
    busy = world.events("dead", "resubmit", "--all")
    assert busy.code == 1
    assert "another process writes" in busy.err
    world.log.close()
    sent = world.events("dead", "resubmit", "{}:{}".format(*first), "--json")
    assert (sent.code, sent.json) == (0, {"resubmitted": 1, "already": 0, "gone": 0, "unknown": 0})
    again = world.events("dead", "resubmit", "--all", "--json")
    assert again.json == {"resubmitted": 1, "already": 1, "gone": 0, "unknown": 0}
    world.log = world.open()
    values = [record.value for partition in world.log.ends() for record in world.log.read({partition: 0})]
    assert sorted(values) == sorted([b"{broken", b"\x1b[31mred"] * 2)
    assert "yes" in world.events("dead", "list").out


def test_a_letter_that_is_not_there_is_named(world: World) -> None:
    bury(world, b"{")
    answer = world.events("dead", "show", "0:99")
    assert answer.code == 1
    assert "no letter stands at 0:99" in answer.err
    assert world.events("dead", "resubmit").code == 2


def test_a_log_that_is_not_there_is_an_error_with_words(world: World) -> None:
    answer = world.events("tail", "--state-dir", str(world.folder / "nowhere"))
    assert answer.code == 1
    assert "nowhere" in answer.err
    assert "Traceback" not in answer.err
