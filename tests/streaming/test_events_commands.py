"""`plexrank events`: what is in the log, given again, and what was refused, while a server writes beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from engine import cli
from engine.components import EventLog, LogRecord
from engine.events import EventLimits, Reason
from engine.hashing import fingerprint
from engine.loading import load_config
from engine.plugins import installed
from engine.streaming.events.dead import Dead, DeadLetters
from engine.streaming.events.decode import decode_records
from engine.streaming.events.open_log import open_log
from engine.streaming.learning.checkpointing import LearnerCheckpoints

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

    def events_of(self, *arguments: object) -> Answer:
        """`plexrank events COMMAND ...`, of no log."""
        return self._run("events", *arguments)

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
    begin = time.time()
    partition, offset = world.click(7)
    (record,) = [json.loads(text) for text in world.events("tail", "--json").lines]
    assert (record["partition"], record["offset"], record["key"]) == (partition, offset, "u1")
    assert record["event"]["data"]["item"] == "7"
    assert begin - 1 <= record["seconds"] <= time.time()


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
        "lag": None,
    }
    assert by_place["deltas", 0]["age"] is None
    assert "examples" in world.events("topics").out


def test_topics_begins_a_log_that_is_not_there_yet(world: World) -> None:
    answer = world.events("topics", "--state-dir", str(world.folder / "new"), "--json")
    assert answer.code == 0, answer.err
    assert [row["end"] for row in answer.json] == [0] * 8


def checkpoint_of(world: World, positions: dict[int, int], identity: str | None = None) -> Path:
    """As a learner leaves it under --out."""
    out = world.folder / f"learner-{time.time_ns()}"
    state = {
        "identity": identity or world.log.identity,
        "positions": {str(p): offset for p, offset in positions.items()},
    }
    assert LearnerCheckpoints(out / "checkpoints", 2).save({"weight": torch.ones(1)}, {}, state) is not None
    return out


def test_topics_says_how_far_a_learners_checkpoint_is_behind(world: World) -> None:
    for n in range(20):
        world.click(n, f"u{n}")
    ends = world.log.ends()
    assert min(ends.values()) >= 3
    out = checkpoint_of(world, {0: ends[0] - 3, 1: ends[1]})
    rows = world.events("topics", "--learner", str(out), "--json").json
    assert [row["lag"] for row in rows if row["stream"] == "events"] == [3, 0]
    assert {row["lag"] for row in rows if row["stream"] != "events"} == {None}
    assert "learner's lag" in world.events("topics", "--learner", str(out)).out


def test_topics_refuses_a_folder_that_is_no_learners_or_of_another_log(world: World) -> None:
    answer = world.events("topics", "--learner", str(world.folder))
    assert (answer.code, "holds no learner's checkpoint" in answer.err) == (1, True)
    answer = world.events("topics", "--learner", str(checkpoint_of(world, {0: 1}, "local:another")))
    assert (answer.code, "of another log (local:another)" in answer.err) == (1, True)


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
    assert re.search(r"process \d+ writes this event log", busy.err)
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


# --------------------------------------------------------------------------------------- files of events
def interaction(n: int, **changes: Any) -> dict[str, Any]:
    data = {"type": "click", "user": "u1", "item": str(n)} | changes
    return {"id": f"f{n}", "source": "file", "type": "interaction", "time": "2026-01-31T12:00:00Z", "data": data}


def ndjson(folder: Path, *lines: object, name: str = "events.ndjson") -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_is_imported_and_each_line_that_is_refused_is_named(world: World) -> None:
    world.log.close()
    path = ndjson(world.folder, interaction(1), "{not json", interaction(2), {"id": "x"}, interaction(3))
    answer = world.events("import", path, "--json")
    assert answer.code == 1
    assert (answer.json["accepted"], answer.json["refused"]) == (3, 2)
    assert [fault.split(": ")[0] for fault in answer.json["faults"]] == [f"{path}:2", f"{path}:4"]
    assert f"{path}:2: not JSON" in answer.err
    world.log = world.open()
    values = [json.loads(r.value) for p in world.log.ends() for r in world.log.read({p: 0})]
    assert [event["id"] for event in values] == ["f1", "f2", "f3"]


def test_a_table_is_imported_as_interactions(world: World) -> None:
    world.log.close()
    path = world.folder / "clicks.csv"
    path.write_text("user,item,time,ranking\nu1,5,1769860800,r1\nu2,7,2026-01-31T12:00:00Z,\n")
    answer = world.events("import", path, "--type", "view", "--source", "shop")
    assert (answer.code, answer.out) == (0, "2 accepted\n")
    world.log = world.open()
    values = sorted(
        (json.loads(r.value) for p in world.log.ends() for r in world.log.read({p: 0})), key=lambda e: e["data"]["user"]
    )
    assert [event["data"] for event in values] == [
        {"type": "view", "user": "u1", "item": "5", "ranking": "r1"},
        {"type": "view", "user": "u2", "item": "7"},
    ]
    assert {event["source"] for event in values} == {"shop"}


@pytest.mark.parametrize("form", ["binary", "arrow"])
def test_a_file_is_imported_in_another_form_and_reads_as_the_same_events(world: World, form: str) -> None:
    several = len(world.log.ends()) > 1
    world.log.close()
    answer = world.events("import", ndjson(world.folder, *map(interaction, range(3))), "--form", form)
    world.log = world.open()
    if form == "arrow" and several:
        assert answer.code == 1
        assert "one partition" in answer.err
        return
    assert (answer.code, answer.out) == (0, "3 accepted\n")
    records = [r for p in world.log.ends() for r in world.log.read({p: 0})]
    assert len(records) == (1 if form == "arrow" else 3)
    found = decode_records(records, EventLimits(), now=2e9, future_seconds=1e9)
    assert found.interactions.item.tolist() == [fingerprint(str(n)) for n in range(3)]
    assert not found.dead


def test_another_form_is_not_for_a_server(world: World) -> None:
    answer = world.events("import", ndjson(world.folder, interaction(1)), "--form", "arrow", "--server", "http://x:1")
    assert answer.code == 2


def test_importing_beside_a_server_says_how(world: World) -> None:
    answer = world.events("import", ndjson(world.folder, interaction(1)))
    assert answer.code == 1
    assert re.search(r"process \d+ writes this event log", answer.err)


class FakeServer(BaseHTTPRequestHandler):
    """Takes events; the first request finds it busy."""

    bodies: ClassVar[list[bytes]] = []
    busy: ClassVar[int] = 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if FakeServer.busy:
            FakeServer.busy -= 1
            self.send_response(503)
            self.send_header("retry-after", "0")
            self.end_headers()
            return
        FakeServer.bodies.append(body)
        receipts = [{"id": str(n), "status": "accepted"} for n, _ in enumerate(body.splitlines())]
        answer = json.dumps({"events": receipts}).encode()
        self.send_response(202)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        return


def test_a_server_can_be_sent_the_events_and_is_waited_for(world: World) -> None:
    path = ndjson(world.folder, *(interaction(n) for n in range(2500)))
    server = HTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answer = world.events("import", path, "--server", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert (answer.code, answer.out) == (0, "2,500 accepted\n"), answer.err
    assert [len(body.splitlines()) for body in FakeServer.bodies] == [1000, 1000, 500]
    assert json.loads(FakeServer.bodies[2].splitlines()[-1])["id"] == "f2499"


def test_a_server_that_is_not_there_is_named(world: World) -> None:
    path = ndjson(world.folder, interaction(1))
    answer = world.events("import", path, "--server", "http://127.0.0.1:1")
    assert answer.code == 1
    assert "http://127.0.0.1:1/v1/events" in answer.err
    assert "is no server" in world.events("import", path, "--server", "file:///etc/passwd").err


def ranking(n: int, **fields: Any) -> dict[str, Any]:
    data = {"request_id": f"r{n}", "user": "u1", "items": [{"id": "1"}, {"id": "2"}]} | fields
    return {"id": f"r{n}", "source": "file", "type": "ranking", "time": "2026-01-31T12:00:00Z", "data": data}


def checked(answer: Answer) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["status"], check["detail"]) for check in answer.json["files"][0]["checks"]}


def test_a_good_file_passes(world: World) -> None:
    good = ndjson(world.folder, ranking(1, history=[], user_features={}), interaction(1, ranking="r1"))
    answer = world.events_of("validate", good, "--json")
    assert (answer.code, answer.json["ok"]) == (0, True)
    assert {status for status, _ in checked(answer).values()} == {"PASS"}
    assert "PASS" in world.events_of("validate", good).out


def test_what_a_learner_would_miss_is_a_warning_and_a_refused_event_a_failure(world: World) -> None:
    older = interaction(4) | {"time": "2020-01-01T00:00:00Z"}
    file = ndjson(world.folder, ranking(1), interaction(2, ranking="other"), interaction(2, ranking="other"), older)
    found = checked(world.events_of("validate", file, "--json"))
    assert found["events can be read"] == ("PASS", "4 of 4")
    assert found["each (source, id) comes once"][0] == "WARN"
    assert found["times rise"][1].startswith("1 are older")
    assert found["interactions name their ranking"][1].startswith("1 name none")
    assert found["their rankings are in the file"][1].startswith("2 name one")
    assert found["rankings hold what was scored with"][1].startswith("1 hold neither")
    assert world.events_of("validate", file).code == 0
    broken = ndjson(world.folder, interaction(1), "nonsense", name="broken.jsonl")
    answer = world.events_of("validate", broken)
    assert answer.code == 1
    assert "FAIL" in answer.out
    assert f"{broken}:2: not JSON" in answer.err
