"""Whether the services that the environment names can be reached; none is needed to train or to serve in process."""

from __future__ import annotations

import importlib.util
import os
import socket

from engine.doctor.address import address
from engine.doctor.finding import Finding
from engine.doctor.triton import examine_triton

TIMEOUT = 3.0
"""Seconds that a service has to answer."""


def examine_services() -> list[Finding]:
    """Kafka (KAFKA_BOOTSTRAP), Triton (TRITON_URL) and Redis (REDIS_URL)."""
    return [
        _kafka(os.environ.get("KAFKA_BOOTSTRAP", "")),
        examine_triton(os.environ.get("TRITON_URL", ""), TIMEOUT),
        _redis(os.environ.get("REDIS_URL", "")),
    ]


def _kafka(bootstrap: str) -> Finding:
    if not bootstrap:
        return Finding("kafka", "info", "not configured; the embedded log is used (set KAFKA_BOOTSTRAP=host:port)")
    failures = []
    for server in filter(None, (s.strip() for s in bootstrap.split(","))):
        try:
            return Finding("kafka", "ok", f"{server} {_speak_kafka(server)}")
        except (OSError, ValueError) as error:
            failures.append(f"{server}: {error}")
    remedy = f"nc -vz {bootstrap.split(',')[0].replace(':', ' ')}; start the broker, or advertise it under this address"
    return Finding("kafka", "warn", f"not reachable: {'; '.join(failures)}", remedy)


def _speak_kafka(server: str) -> str:
    """Sends ApiVersions (key 18, version 0), which every broker since 0.10 answers before anything else."""
    with socket.create_connection(address(server, 9092), timeout=TIMEOUT) as link:
        body = (
            (18).to_bytes(2, "big")
            + (0).to_bytes(2, "big")
            + (7).to_bytes(4, "big")
            + (-1).to_bytes(2, "big", signed=True)
        )
        link.sendall(len(body).to_bytes(4, "big") + body)
        answer = link.recv(8)
    if len(answer) < 8 or int.from_bytes(answer[4:8], "big") != 7:
        raise ValueError("something answers there, but not in Kafka's protocol (a TLS listener?)")
    return "answers"


def _redis(url: str) -> Finding:
    if not url:
        return Finding("redis", "info", "not configured; users' histories are kept in SQLite (set REDIS_URL)")
    try:
        with socket.create_connection(address(url, 6379), timeout=TIMEOUT) as link:
            link.sendall(b"PING\r\n")
            answer = link.recv(64)
    except (OSError, ValueError) as error:
        return Finding(
            "redis", "warn", f"{url.rpartition('@')[2]} is not reachable: {error}", "redis-server --daemonize yes"
        )
    if not answer.startswith((b"+PONG", b"-NOAUTH")):
        return Finding("redis", "warn", "something answers there, but not in Redis' protocol", "redis-cli ping")
    if importlib.util.find_spec("redis") is None:
        return Finding("redis", "warn", "answers, but its client is not installed", 'pip install "plexrank[redis]"')
    return Finding("redis", "ok", "answers")
