"""One log, learnt twice: from a broker and from a file that was imported, and killed on the way, to the same digest."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import yaml

from engine.bundle import Bundle
from engine.config import Config
from engine.events import EventLimits
from engine.plugins import Plugins
from engine.streaming.events.import_events import Tally, read_events
from engine.streaming.events.open_log import open_log
from engine.streaming.learning.learner import Learner
from plugins.events.kafka import KafkaEventLog
from tests.brokers import Broker
from tests.faults.test_learner_faults import RECORD, arguments, run
from tests.streaming.film_stream import visits

BATCH = 32
JOIN = {"window_seconds": 20, "lateness_seconds": 5, "negatives": 0.7, "feedback": {"liked": {"name": "fnw"}}}


@pytest.mark.slow
def test_a_replay_from_a_broker_and_one_of_an_import_that_is_killed_join_the_same_examples(
    tiny_bundle: Path, plugins: Plugins, tansu: Broker, tmp_path: Path
) -> None:
    """kill -9 at three random points of a real process; presumed negatives and positives are among the examples."""
    stream = visits(300)
    whole = Bundle.open(tiny_bundle, verify=False).config.model_dump(mode="json", exclude_defaults=True)
    whole["serving"]["event_log"] = {"name": "local", "options": {"partitions": 1, "fsync": "never"}}
    whole["learning"] = {"join": JOIN, "batch_size": BATCH, "chunk": 40, "checkpoint_events": 90}
    config, state, events = tmp_path / "films.yaml", tmp_path / "state", tmp_path / "events.ndjson"
    config.write_text(yaml.safe_dump(whole))
    events.write_bytes(b"".join(value + b"\n" for _, value in stream.events))
    local = open_log(plugins, Config.model_validate(whole).serving.event_log, state)
    local.append([(event.key, event.value) for event in read_events(events, EventLimits(), Tally())])
    local.close()
    learn = arguments(config, tiny_bundle, state, tmp_path / "out")
    lines = run("tests.faults.learner_lives", "3", "5", learn[-2], str(BATCH * RECORD.itemsize), *learn).stdout
    *_, last, kills = lines.splitlines()
    imported = json.loads(last)
    assert kills == "kills 3"

    name = f"films-{uuid.uuid4().hex[:12]}"
    log = KafkaEventLog(KafkaEventLog.Options(**tansu.options, topic=name, partitions=1))
    stream.write(log)
    other = {**whole["learning"], "batch_size": 50, "checkpoint_events": 100_000}
    learner = Learner(
        Config.model_validate({**whole, "learning": other}), log, tmp_path / "kafka", plugins=plugins,
        bundle=tiny_bundle,
    )  # fmt: skip
    read = learner.run("end")
    learner.close()
    log.close()
    assert imported["events"] == read["events"]
    assert imported["join"] == read["join"]
    assert imported["examples"]["joined"] == read["examples"]["joined"]
    assert read["examples"]["presumed"] > 500
    assert imported["examples_sha256"] == read["examples_sha256"] is not None
