"""Event log `kafka`: a topic of Apache Kafka or of anything that speaks its protocol."""

from __future__ import annotations

from engine.components import EventLog
from engine.hookspecs import hookimpl
from plugins.events.kafka_client import Client, KafkaOptions
from plugins.events.kafka_log import KafkaLog


class KafkaEventLog(KafkaLog):
    """Events in a Kafka topic, for several servers and learners.

    The client is kafka-python, in pure Python; `kafka-fast` is the same over librdkafka. Offsets live in the learner's
    checkpoint, not in the broker. Readers may be assigned by hand or share a group.
    """

    name = "kafka"

    @classmethod
    def _make_client(cls, options: KafkaOptions) -> Client:
        from plugins.events.kafka_python import PythonClient

        return PythonClient(options)


@hookimpl
def event_logs() -> list[type[EventLog]]:
    return [KafkaEventLog]
