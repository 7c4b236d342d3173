"""What the event logs on Kafka need of a client library, so that one logic stands over two of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from engine.components import LogRecord
from engine.errors import LogUnavailable
from plugins.events.kafka_security import SecurityOptions, handshake, remedy

Event = tuple[str, bytes | None]  # key, value; None: a tombstone
Headers = Sequence[tuple[str, bytes]]


class KafkaOptions(SecurityOptions):
    """Where the brokers are, which topic, and how the client behaves."""

    bootstrap_servers: list[str] = Field(
        ["127.0.0.1:9092"], min_length=1, description="brokers to ask first, host:port each"
    )
    topic: str = Field(
        "plexrank.events", pattern=r"^[a-zA-Z0-9._-]{1,180}$", description="the topic; siblings are <topic>.<name>"
    )
    partitions: int = Field(4, ge=1, le=10_000, description="of topics that are made; one that exists keeps its own")
    replication: int = Field(1, ge=1, le=32, description="copies of each partition, of topics that are made")
    create_topics: bool = Field(True, description="missing topics are made")
    api_version: str = Field(
        "auto", pattern=r"^(auto|\d+\.\d+(\.\d+)?)$", description="protocol; a version, such as 0.9, where auto hangs"
    )
    linger_ms: int = Field(5, ge=0, description="how long a batch waits for company while nobody waits for it")
    batch_bytes: int = Field(256 << 10, ge=1, description="most bytes of a batch")
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = Field(
        "none", description="of batches; snappy, lz4 and zstd need their packages with kafka-python"
    )
    timeout_ms: int = Field(5000, ge=500, description="longest wait for an answer of the brokers")
    fetch_wait_ms: int = Field(50, ge=1, description="how long a broker may hold an empty answer back")
    session_timeout_ms: int = Field(
        10_000, ge=1000, description="a group gives a silent reader's partitions to others after this"
    )


@dataclass(frozen=True)
class Topic:
    """A topic that exists. identity: the broker's id of it, '' where it gives none."""

    partitions: int
    identity: str


@dataclass(frozen=True)
class Fetched:
    """Records that a consumer gave, and the tombstones among them: (partition, offset, key)."""

    records: list[LogRecord]
    tombstones: list[tuple[int, int, str]]


class Consumer(ABC):
    """Reads one topic, for one thread; OffsetGone is what it raises for an offset that the broker has not."""

    @abstractmethod
    def assign(self, positions: Mapping[int, int]) -> None:
        """Exactly these partitions, from there; forgets the high watermarks it knew."""

    @abstractmethod
    def subscribe(self, begin: Callable[[Sequence[int]], Mapping[int, int]]) -> None:
        """Partitions as the group shares them out; `begin`: those given by it -> where to begin."""

    @abstractmethod
    def poll(self, limit: int, timeout: float) -> Fetched: ...

    @abstractmethod
    def seek(self, positions: Mapping[int, int]) -> None: ...

    @abstractmethod
    def positions(self) -> dict[int, int]: ...

    @abstractmethod
    def highwaters(self) -> dict[int, int]:
        """Of the last answer for each partition that has had one."""

    @abstractmethod
    def begins(self, partitions: Sequence[int]) -> dict[int, int]: ...

    @abstractmethod
    def latest(self, partitions: Sequence[int]) -> dict[int, int]:
        """What the broker says is the end; some say too little, so `highwaters` must be heard, too."""

    @abstractmethod
    def at_time(self, partitions: Sequence[int], seconds: float) -> dict[int, int | None]:
        """What the broker says is the first offset at or after a time, None: none is."""

    @abstractmethod
    def committed(self, partitions: Sequence[int]) -> dict[int, int]:
        """Of those for which the group has an offset."""

    @abstractmethod
    def commit(self, positions: Mapping[int, int]) -> None: ...

    @abstractmethod
    def pause(self, partitions: Sequence[int]) -> None: ...

    @abstractmethod
    def resume(self, partitions: Sequence[int]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class Client(ABC):
    """Connects when it is first used. LogUnavailable where the brokers do not answer in time."""

    def __init__(self, options: KafkaOptions) -> None:
        self.options = options

    @abstractmethod
    def topic(self, name: str) -> Topic | None:
        """None where it does not exist or has no leader yet. Brokers before 0.10.1 may make it when they are asked."""

    @abstractmethod
    def create(self, name: str, partitions: int, *, compact: bool) -> None:
        """Nothing happens where it exists, or where the brokers are too old to be told."""

    @abstractmethod
    def produce(self, topic: str, events: Sequence[Event], headers: Sequence[Headers] | None) -> list[tuple[int, int]]:
        """Acknowledged by all in-sync replicas on return; headers are dropped where the brokers know none."""

    @abstractmethod
    def consumer(self, topic: str, group: str | None, wait_ms: int) -> Consumer: ...

    @abstractmethod
    def close(self) -> None: ...

    def unavailable(self, what: str, said: object) -> LogUnavailable:
        """The error for a complaint of the library, with what to do about it."""
        words = str(said)
        if self.options.security_protocol.endswith("SSL"):
            words = handshake(self.options, self.options.bootstrap_servers[0]) or words
        servers = ", ".join(self.options.bootstrap_servers)
        return LogUnavailable(f"kafka at {servers}: {what}: {words}; {remedy(self.options, words)}")


class OffsetGone(Exception):
    """The broker does not have the offset that was asked for."""
