"""One run of tritonserver: what is checked before, its command line, the wait until it answers, its end."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import PlexrankError
from serving.child import Child
from serving.triton import shm
from serving.triton.backends import make_backends
from serving.triton.client import CONTROL_KEY, TritonClient
from serving.triton.environment import server_environment
from serving.triton.state import Identity, wait_until
from serving.triton.stubs import Stubs, end_all
from serving.triton.wheel import Wheel

LOG = "server.log"
_EXIT_SECONDS = 10
"""That requests have to end after SIGTERM; the server needs them all when a model's process has died before."""
_CONTROLS = "model-repository,shared-memory,trace,logging"
"""What can run code (a model is code) or write files."""


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    http: int
    grpc: int
    metrics: int

    @classmethod
    def chosen(cls, host: str, http: int, grpc: int, metrics: int) -> Ports:
        """0 becomes a free one. PlexrankError names one that is taken, or an address that cannot be."""
        if ":" in host:
            raise PlexrankError(
                f"--host {host}: tritonserver listens on IPv4 addresses alone; 0.0.0.0 means all of them"
            )
        with ExitStack() as held:
            numbers = []
            for name, wanted in (("http", http), ("grpc", grpc), ("metrics", metrics)):
                sock = held.enter_context(socket.socket(socket.AF_INET))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind((host, wanted))
                    sock.listen(1)
                except OSError as error:
                    why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
                    remedy = f"choose another with --{name}-port (0: any free one)"
                    raise PlexrankError(f"port {wanted} of {host}, for {name}, {why}: {remedy}") from error
                numbers.append(sock.getsockname()[1])
        return cls(*numbers)


@dataclass(frozen=True)
class Launch:
    """Everything that a run depends on.

    All paths are absolute. folder: of the state. control: the secret that model control needs over HTTP, and where
    `guarded` over gRPC too.
    """

    wheel: Wheel
    repository: Path
    folder: Path
    host: str
    ports: Ports
    control: str
    guarded: bool
    threads: int = 1

    @property
    def prefix(self) -> str:
        return shm.prefix_of(self.folder)

    @property
    def backends(self) -> Path:
        """Also where the server works: its models' Python takes modules from there before all others."""
        return self.folder / "backends"

    @property
    def url(self) -> str:
        """Of gRPC, for processes of this machine."""
        return f"{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.ports.grpc}"  # noqa: S104

    def command(self) -> list[str]:
        """The server's command line; makes the folder of backends."""
        backends = make_backends(self.wheel, self.backends)
        addresses = [f"--{name}-address={self.host}" for name in ("http", "grpc", "metrics")]
        guard = f"{_CONTROLS}:{CONTROL_KEY}={self.control}"
        return [
            str(self.wheel.server),
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={backends}",
            f"--cache-directory={self.wheel.tree / 'caches'}",
            *addresses,
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            f"--http-restricted-api={guard}",
            *([f"--grpc-restricted-protocol={guard}"] if self.guarded else []),
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            "--exit-on-error=false",
            f"--exit-timeout-secs={_EXIT_SECONDS}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            f"--backend-config=python,shm-region-prefix-name={self.prefix}",
            "--backend-config=python,stub-timeout-seconds=60",
        ]


def is_open(host: str) -> bool:
    """Whether others than this machine reach an address; so say names that are none."""
    with suppress(ValueError):
        return not ipaddress.ip_address(host).is_loopback
    return host != "localhost"


class ServerProcess:
    """tritonserver, started, and later ended with all its models' processes. Start it from the thread that watches it.

    It also ends, in good order, when this process does, kill -9 included.
    """

    def __init__(self, launch: Launch) -> None:
        """PlexrankError where it cannot be started; what it says goes to `LOG`, that of the run before to `LOG`.1."""
        self.launch = launch
        shm.clear(launch.prefix)
        log = launch.folder / LOG
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        environment = server_environment(launch.wheel, launch.threads)
        command = launch.command()
        self._child = Child(command, log, environment, at_parents_end=signal.SIGTERM, folder=launch.backends)
        self.client = TritonClient(launch.url, launch.control)
        self.stubs = Stubs(self._child.pid)
        self.identity = Identity.of(self._child.pid)

    @property
    def ended(self) -> str:
        """How, and nothing while it runs."""
        return self._child.ending

    def wait_live(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """Until it answers. PlexrankError with its last words where it ends or is silent."""
        wait_until(lambda: stopped() or bool(self.ended) or self._listens(), seconds)
        live = wait_until(lambda: stopped() or bool(self.ended) or self.client.live(1.0), seconds)
        if stopped():
            raise PlexrankError("ended while it started")
        if self.ended or not live:
            fault = f"tritonserver ended with {self.ended}" if self.ended else f"no answer in {seconds:.0f} s"
            raise PlexrankError(f"{fault}: {self.last_words()} (all of it: {self.launch.folder / LOG})")

    def _listens(self) -> bool:
        """Asked without gRPC, which would wait for seconds after a first refusal."""
        host, _, port = self.launch.url.rpartition(":")
        with suppress(OSError):
            socket.create_connection((host, int(port)), 0.5).close()
            return True
        return False

    def last_words(self) -> str:
        """The end of what the server said."""
        return self._child.last_words(5) or "it said nothing"

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends it a signal, and waits for nothing."""
        if self.identity is not None:
            self.identity.send(number)

    def stop(self, grace: float = _EXIT_SECONDS + 5.0) -> None:
        """SIGTERM; SIGKILL when it takes too long, or waits for processes that are dead. Removes its shared memory."""
        self.stubs.tidy(now=True)
        stubs = self.stubs.alive()
        self.terminate()
        wait_until(lambda: bool(self.ended) or not any(stub.process.alive for stub in stubs), grace)
        wait_until(lambda: bool(self.ended), 1.5)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to it and to all its models' processes; removes its shared memory."""
        self._child.stop(0.0)
        end_all(self.launch.prefix)
        self.client.close()
        shm.clear(self.launch.prefix)
