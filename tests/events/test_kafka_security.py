"""TLS and SASL reach every client, and a password reaches nothing else."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.errors import LogUnavailable, PlexrankError, PluginError
from plugins.events import kafka_python
from plugins.events.kafka import KafkaEventLog
from plugins.events.kafka_client import KafkaOptions
from plugins.events.kafka_fast import KafkaFastEventLog
from plugins.events.kafka_security import librdkafka_settings
from tests.brokers import free_port

PASSWORD = "s3cret-pass-word"
SASL = {
    "security_protocol": "SASL_SSL",
    "sasl_mechanism": "SCRAM-SHA-512",
    "sasl_username": "plexrank",
    "password_env": "KAFKA_PASSWORD",
}


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, str]:
    """A certificate for `localhost`, signed by itself, and its key."""
    made = {"ssl_certfile": str(tmp_path / "cert.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-addext", "subjectAltName=DNS:localhost", "-out", made["ssl_certfile"], "-keyout", made["ssl_keyfile"]]
    subprocess.run([*command, *files], check=True, capture_output=True)
    return {**made, "ssl_cafile": made["ssl_certfile"]}


def options(**given: Any) -> KafkaOptions:
    return KafkaOptions.model_validate({"bootstrap_servers": ["broker.example:9093"], **given})


def test_security_reaches_producer_consumer_and_administrator(
    pem: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    taken: dict[str, dict[str, Any]] = {}

    def capture(name: str) -> Any:
        def make(**settings: Any) -> Any:
            taken[name] = settings
            raise kafka_python.errors.KafkaTimeoutError("not there")

        return make

    monkeypatch.setattr(kafka_python.kafka, "KafkaProducer", capture("producer"))
    monkeypatch.setattr(kafka_python.kafka, "KafkaConsumer", capture("consumer"))
    monkeypatch.setattr(kafka_python, "KafkaAdminClient", capture("administrator"))
    client = kafka_python.PythonClient(options(**SASL, **pem, ssl_check_hostname=False))
    for use in (
        lambda: client.topic("t"),
        lambda: client.produce("t", [("k", b"v")], None),
        lambda: client.consumer("t", None, 10),
    ):
        with pytest.raises(LogUnavailable):
            use()
    expected = {
        "bootstrap_servers": ["broker.example:9093"],
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "plexrank",
        "sasl_plain_password": PASSWORD,
        "ssl_cafile": pem["ssl_cafile"],
        "ssl_certfile": pem["ssl_certfile"],
        "ssl_keyfile": pem["ssl_keyfile"],
        "ssl_check_hostname": False,
    }
    assert set(taken) == {"producer", "consumer", "administrator"}
    for name, settings in taken.items():
        assert {key: settings.get(key) for key in expected} == expected, name
    assert taken["producer"]["acks"] == "all"
    assert taken["consumer"]["auto_offset_reset"] == "none"
    assert taken["consumer"]["enable_auto_commit"] is False


def test_security_reaches_librdkafka_by_its_own_names(pem: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    assert librdkafka_settings(options(**SASL, **pem)) == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "plexrank",
        "sasl.password": PASSWORD,
        "ssl.ca.location": pem["ssl_cafile"],
        "ssl.certificate.location": pem["ssl_certfile"],
        "ssl.key.location": pem["ssl_keyfile"],
        "ssl.endpoint.identification.algorithm": "https",
    }


def test_the_password_comes_from_a_file_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(f"{PASSWORD}\n")
    given = options(**{**SASL, "password_env": None, "password_file": str(path)})
    assert librdkafka_settings(given)["sasl.password"] == PASSWORD
    path.write_text("rotated\nsecond line\n")
    assert librdkafka_settings(given)["sasl.password"] == "rotated"
    path.write_text("\n")
    with pytest.raises(PluginError, match="the first line must be the password"):
        librdkafka_settings(given)
    path.unlink()
    with pytest.raises(PluginError, match=r"password_file.: No such file"):
        librdkafka_settings(given)


@pytest.mark.parametrize("cls", [KafkaEventLog, KafkaFastEventLog])
def test_the_password_is_in_no_representation_error_or_log(
    cls: type[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    caplog.set_level(logging.DEBUG)
    for name in ("kafka", "kafka.admin.client", "plexrank.events.librdkafka"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    given = {**SASL, "security_protocol": "SASL_PLAINTEXT", "bootstrap_servers": [f"127.0.0.1:{free_port()}"]}
    log = cls(cls.Options.model_validate({**given, "timeout_ms": 500}))
    shown = [repr(log.options), str(log.options.model_dump()), log.options.model_dump_json()]
    for use in (log.health, log.ends, lambda: log.append([("k", b"v")])):
        with pytest.raises(LogUnavailable) as error:
            use()
        shown += [str(error.value), repr(error.value), repr(error.value.__cause__)]
    log.close()
    out = capfd.readouterr()
    assert cls is KafkaFastEventLog or "security_protocol" in caplog.text, "the client logs its settings"
    assert PASSWORD not in "\n".join([*shown, caplog.text, out.out, out.err])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"security_protocol": "SASL_SSL"}, "needs sasl_mechanism and sasl_username"),
        ({**SASL, "password_env": None}, "needs one of password_env and password_file"),
        ({**SASL, "password_file": "x"}, "needs one of password_env and password_file"),
        ({**SASL, "security_protocol": "SSL"}, "need security_protocol: SASL_SSL"),
        ({"security_protocol": "SSL", "ssl_keyfile": "x"}, "ssl_keyfile needs ssl_certfile"),
        ({"password": PASSWORD}, "Extra inputs are not permitted"),
        ({**SASL, "sasl_mechanism": "GSSAPI"}, "SCRAM-SHA-512"),
    ],
)
def test_half_a_security_configuration_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        options(**given)


def test_a_missing_password_or_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_PASSWORD", raising=False)
    with pytest.raises(PluginError, match="environment variable KAFKA_PASSWORD"):
        librdkafka_settings(options(**SASL))
    with pytest.raises(PluginError, match=r"/no/ca.pem \(ssl_cafile\): cannot be read"):
        librdkafka_settings(options(security_protocol="SSL", ssl_cafile="/no/ca.pem"))


@pytest.fixture
def tls_port(pem: dict[str, str]) -> Iterator[int]:
    """A port that shakes hands in TLS with the certificate, and says no more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem["ssl_certfile"], pem["ssl_keyfile"])
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


@pytest.mark.parametrize("cls", [KafkaEventLog, KafkaFastEventLog])
def test_a_certificate_of_an_unknown_authority_is_refused_with_the_remedy(cls: type[Any], tls_port: int) -> None:
    given = {"bootstrap_servers": [f"localhost:{tls_port}"], "security_protocol": "SSL", "timeout_ms": 1500}
    log = cls(cls.Options.model_validate(given))
    with pytest.raises(LogUnavailable, match=r"(?i)certificate.*set ssl_cafile to the PEM file"):
        log.health()
    log.close()


@pytest.mark.parametrize("cls", [KafkaEventLog, KafkaFastEventLog])
def test_a_certificate_for_another_name_is_refused_with_the_remedy(
    cls: type[Any], tls_port: int, pem: dict[str, str]
) -> None:
    given = {"bootstrap_servers": [f"127.0.0.1:{tls_port}"], "security_protocol": "SSL", "timeout_ms": 1500}
    log = cls(cls.Options.model_validate({**given, "ssl_cafile": pem["ssl_cafile"]}))
    with pytest.raises(LogUnavailable, match="certificate is for another name"):
        log.health()
    log.close()


def test_a_client_that_is_not_installed_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    monkeypatch.delitem(sys.modules, "plugins.events.kafka_librdkafka", raising=False)
    with pytest.raises(PlexrankError, match=r"pip install 'plexrank\[kafka-fast\]'"):
        KafkaFastEventLog(KafkaFastEventLog.Options())
    monkeypatch.setitem(sys.modules, "kafka", None)
    monkeypatch.delitem(sys.modules, "plugins.events.kafka_python", raising=False)
    with pytest.raises(PlexrankError, match=r"pip install 'plexrank\[kafka\]'"):
        KafkaEventLog(KafkaEventLog.Options())
