"""How a Kafka client proves who it is and whom it talks to; a secret never stands in the configuration or a message."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from engine.components import PluginOptions
from engine.errors import PluginError


class Secret(str):
    """A password that does not show in the representation of what holds it, such as a client's settings in a log."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


class SecurityOptions(PluginOptions):
    """TLS and SASL, with the names that Kafka's own clients have for them."""

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="SSL: encrypted; SASL_...: with a user's name and password"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="how the password is proved; needed with SASL_..."
    )
    sasl_username: str | None = Field(None, min_length=1, description="needed with SASL_...")
    password_env: str | None = Field(None, min_length=1, description="environment variable that holds the password")
    password_file: str | None = Field(None, min_length=1, description="file that holds the password, in its first line")
    ssl_cafile: str | None = Field(
        None, description="PEM file of the authorities that may have signed the broker's certificate; else the system's"
    )
    ssl_certfile: str | None = Field(
        None, description="PEM file of this client's certificate, where brokers ask for it"
    )
    ssl_keyfile: str | None = Field(None, description="PEM file of its private key")
    ssl_check_hostname: bool = Field(
        True, description="the broker's certificate must be for the name that it is called"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.security_protocol.startswith("SASL"):
            if self.sasl_mechanism is None or self.sasl_username is None:
                raise ValueError(f"{self.security_protocol} needs sasl_mechanism and sasl_username")
            if (self.password_env is None) == (self.password_file is None):
                raise ValueError(f"{self.security_protocol} needs one of password_env and password_file")
        elif self.sasl_mechanism or self.sasl_username or self.password_env or self.password_file:
            raise ValueError("a user's name and password need security_protocol: SASL_SSL (or SASL_PLAINTEXT)")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile needs ssl_certfile")
        return self


def password(options: SecurityOptions) -> Secret | None:
    """From the environment or the file, read anew at each call, so that it can be rotated. PluginError if missing."""
    if options.password_env is not None:
        found = os.environ.get(options.password_env, "")
        if not found:
            raise PluginError(f"kafka: the environment variable {options.password_env} (password_env) is not set")
        return Secret(found)
    if options.password_file is not None:
        try:
            lines = Path(options.password_file).read_text().splitlines()
        except OSError as error:
            raise PluginError(f"{options.password_file} (password_file): {error.strerror}") from error
        if not lines or not lines[0]:
            raise PluginError(f"{options.password_file} (password_file): the first line must be the password")
        return Secret(lines[0])
    return None


def python_settings(options: SecurityOptions) -> dict[str, Any]:
    """For kafka-python. PluginError where a password or a file is missing."""
    settings: dict[str, Any] = {"security_protocol": options.security_protocol}
    if options.security_protocol.startswith("SASL"):
        settings |= {
            "sasl_mechanism": options.sasl_mechanism,
            "sasl_plain_username": options.sasl_username,
            "sasl_plain_password": password(options),
        }
    if options.security_protocol.endswith("SSL"):
        settings |= {**_files(options), "ssl_check_hostname": options.ssl_check_hostname}
    return settings


def librdkafka_settings(options: SecurityOptions) -> dict[str, Any]:
    """For confluent-kafka. PluginError where a password or a file is missing."""
    settings: dict[str, Any] = {"security.protocol": options.security_protocol}
    if options.security_protocol.startswith("SASL"):
        settings |= {
            "sasl.mechanism": options.sasl_mechanism,
            "sasl.username": options.sasl_username,
            "sasl.password": password(options),
        }
    if options.security_protocol.endswith("SSL"):
        names = {
            "ssl_cafile": "ssl.ca.location",
            "ssl_certfile": "ssl.certificate.location",
            "ssl_keyfile": "ssl.key.location",
        }
        settings |= {names[name]: path for name, path in _files(options).items()}
        settings["ssl.endpoint.identification.algorithm"] = "https" if options.ssl_check_hostname else "none"
    return settings


def _files(options: SecurityOptions) -> dict[str, str]:
    found = {name: getattr(options, name) for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")}
    for name, path in found.items():
        if path is not None and not os.access(path, os.R_OK):
            raise PluginError(f"{path} ({name}): cannot be read")
    return {name: path for name, path in found.items() if path is not None}


def handshake(options: SecurityOptions, server: str) -> str:
    """What TLS says to a server, '' where it agrees or nobody is there; the clients only say that time is over."""
    host, _, port = server.rpartition(":")
    context = ssl.create_default_context(cafile=options.ssl_cafile)
    context.check_hostname = options.ssl_check_hostname
    try:
        if options.ssl_certfile is not None:
            context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
        with socket.create_connection((host.strip("[]"), int(port)), 1.0) as plain:
            context.wrap_socket(plain, server_hostname=host.strip("[]")).close()
    except ssl.SSLError as error:  # CertificateError is one of them
        return str(error)
    except (OSError, ValueError):
        return ""
    return ""


def remedy(options: SecurityOptions, said: str) -> str:
    """What to do about a client's complaint, from its words."""
    lower = said.lower()
    if "certificate verify failed" in lower or "unable to get local issuer" in lower or "self-signed" in lower:
        if "hostname mismatch" in lower or "ip address mismatch" in lower:
            return (
                "the certificate is for another name: use that name in bootstrap_servers, or ssl_check_hostname: false"
            )
        return "set ssl_cafile to the PEM file of the authority that signed the broker's certificate"
    if "ssl" in lower or "tls" in lower or "wrong version number" in lower:
        return (
            f"does the broker's listener speak {options.security_protocol}? check security_protocol and the ssl_ files"
        )
    if "sasl" in lower or "authentication" in lower:
        where = options.password_env or options.password_file or "the password"
        return f"check sasl_username {options.sasl_username!r}, sasl_mechanism and {where}"
    return "is the broker running, and is bootstrap_servers right?"
