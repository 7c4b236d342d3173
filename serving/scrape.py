"""The metrics of the server that scores, beside ours: one address to scrape where that one is not scraped itself."""

from __future__ import annotations

import logging
import re
import time
from http.client import HTTPException, HTTPResponse, IncompleteRead
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

log = logging.getLogger("plexrank.serving")

SECONDS = 0.5
MOST = 4 << 20
_OURS = re.compile(rb"^(?:# (?:HELP|TYPE) )?plexrank_", re.MULTILINE)
_LINE = re.compile(
    rb"^(?:# (?:HELP|TYPE) [a-zA-Z_:][a-zA-Z0-9_:]* .*|[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{.*\})? \S+(?: -?\d+)?)$"
)
_opener = build_opener(ProxyHandler({}))


def scraped(url: str) -> bytes | None:
    """The text at `url` in Prometheus' format, whole lines of it; None where it does not come within half a second, is
    longer than 4 MiB, is none, or would add to our own metrics. Blocks."""
    try:
        until = time.monotonic() + SECONDS
        with _opener.open(url, timeout=SECONDS) as answer:
            text = _read(answer, until)
    except (URLError, HTTPException, OSError, ValueError) as error:
        log.info("no metrics at %s: %s", url, error)
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    if len(text) > MOST or _OURS.search(text) or not all(map(_LINE.match, lines)):
        log.info("no metrics at %s: it is none, or not another server's", url)
        return None
    return b"".join(line + b"\n" for line in lines)


def _read(answer: HTTPResponse, until: float) -> bytes:
    """All of it, or a little more than `MOST`. TimeoutError where its parts come in time and all of them do not."""
    parts, size = [], 0
    while size <= MOST and (part := answer.read1(1 << 16)):
        parts.append(part)
        size += len(part)
        if time.monotonic() > until:
            raise TimeoutError(f"not all came in {SECONDS} s")
    if size <= MOST and answer.length:
        raise IncompleteRead(b"", answer.length)
    return b"".join(parts)
