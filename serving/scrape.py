"""The metrics of the server that scores, beside ours: one address to scrape where that one is not scraped itself."""

from __future__ import annotations

import logging
import re
from http.client import HTTPException
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
        with _opener.open(url, timeout=SECONDS) as answer:
            text: bytes = answer.read(MOST + 1)
    except (URLError, HTTPException, OSError, ValueError) as error:
        log.info("no metrics at %s: %s", url, error)
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    if len(text) > MOST or _OURS.search(text) or not all(map(_LINE.match, lines)):
        log.info("no metrics at %s: it is none, or not another server's", url)
        return None
    return b"".join(line + b"\n" for line in lines)
