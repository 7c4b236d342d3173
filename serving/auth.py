"""Who may ask: a bearer token, or nobody but this machine."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
import re

from engine.errors import ConfigError

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""What a balancer asks without a token."""

_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]*)|\[(?P<six>[0-9A-Fa-f:.]+)\])(?::[0-9]{1,5})?")


class Guard:
    """Decides on a request's headers. Without a token only names of this machine are answered (DNS rebinding)."""

    def __init__(self, token: str | None, *, any_host: bool = False) -> None:
        """token: kept as its digest only. any_host: answer whatever the Host header says."""
        self._digest = None if token is None else hashlib.sha256(token.encode()).digest()
        self._any_host = any_host or token is not None

    @property
    def needs_token(self) -> bool:
        return self._digest is not None

    def allows(self, authorization: str) -> bool:
        """Bearer, or Basic with the token as the password (what a browser asks for). Compared in constant time."""
        if self._digest is None:
            return True
        scheme, _, given = authorization.partition(" ")
        token = given.strip()
        if scheme.lower() == "basic":
            try:
                token = base64.b64decode(token, validate=True).decode().partition(":")[2]
            except ValueError:  # no base64, or no text in it
                token = ""
        elif scheme.lower() != "bearer":
            token = ""
        return hmac.compare_digest(hashlib.sha256(token.encode()).digest(), self._digest)

    def knows_host(self, host: str) -> bool:
        """Whether the Host header may be answered. One that is no name or address, with or without a port, never is."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        return self._any_host or is_loopback((found["name"] or found["six"] or "").lower())


def is_loopback(host: str) -> bool:
    """`localhost`, 127.0.0.0/8 or ::1."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_from(variable: str | None) -> str | None:
    """The token in an environment variable; ConfigError if it is named but not set, or too short to be one."""
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if len(token) < 16:
        raise ConfigError(
            f"serving.token_env: {variable} holds {len(token)} characters; a token has at least 16 "
            f"(make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))')"
        )
    return token


def check_address(host: str, token: str | None, insecure: bool) -> None:
    """ConfigError for an address that others reach while nobody has to show a token."""
    if token is None and not insecure and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines and no token is set: set serving.token_env, "
            f"bind 127.0.0.1, or say --insecure"
        )
