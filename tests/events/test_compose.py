"""compose.yaml cannot run in the tests; what it configures can be checked."""

from __future__ import annotations

from pathlib import Path

import yaml

from engine.commands.training import overrides_of
from engine.loading import load_config
from engine.plugins import installed
from plugins.events.kafka import KafkaEventLog

COMPOSE = Path("compose.yaml")


def test_the_server_and_the_learner_are_told_of_the_same_topic() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    learner = services["learner"]["command"]
    told = learner[learner.index("--set") + 1]
    assert f"--set '{told}'" in services["train"]["command"][0]
    config = load_config(Path(learner[1]), overrides_of([told], None))
    assert config.serving.event_log.name == "kafka"
    options = KafkaEventLog.Options.model_validate(config.serving.event_log.options)
    advertised = services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert [f"PLAINTEXT://{server}" for server in options.bootstrap_servers] == [advertised]
    assert installed().get("event_logs", "kafka") is KafkaEventLog
