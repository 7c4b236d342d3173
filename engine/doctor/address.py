"""Where a service is, as the environment says it."""

from __future__ import annotations

from urllib.parse import urlsplit


def address(text: str, port: int) -> tuple[str, int]:
    """`host:port`, with or without a scheme -> (host, port). ValueError for what is neither."""
    parts = urlsplit(text if "://" in text else f"//{text}")
    if not parts.hostname:
        raise ValueError(f"'{text}' is not host:port")
    return parts.hostname, parts.port or port
