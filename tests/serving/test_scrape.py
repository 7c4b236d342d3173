"""Another server's metrics behind ours: whole, or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving import scrape
from serving.scrape import scraped
from tests.serving.conftest import Running

THEIRS = b"""# HELP nv_inference_count Number of inferences performed
# TYPE nv_inference_count counter
nv_inference_count{model="films",version="1"} 12
nv_inference_exec_count{model="films",version="1"} 5
nv_cpu_utilization 0.25
"""


class Theirs(BaseHTTPRequestHandler):
    text = THEIRS
    status = 200
    hangs = False

    def do_GET(self) -> None:
        if self.hangs:
            time.sleep(2 * scrape.SECONDS)
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def theirs() -> Iterator[tuple[type[Theirs], str]]:
    kind = type("Kind", (Theirs,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield kind, f"http://127.0.0.1:{server.server_address[1]}/metrics"
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


@pytest.mark.parametrize(
    "changed",
    [
        {"status": 500},
        {"hangs": True},
        {"text": b"<html>not metrics</html>"},
        {"text": THEIRS + b'plexrank_shed_total{a="1"} 3\n'},
        {"text": THEIRS[:-9]},
        {"text": b"nv_x 1\n" * (scrape.MOST // 6)},
    ],
    ids=["an error", "a hang", "a page", "names of ours", "cut in the middle", "too much"],
)
def test_what_are_no_metrics_of_others_is_left_out(theirs: tuple[type[Theirs], str], changed: dict[str, Any]) -> None:
    kind, url = theirs
    assert scraped(url) == THEIRS
    for name, value in changed.items():
        setattr(kind, name, value)
    assert scraped(url) is None


def test_one_that_comes_byte_by_byte_is_not_waited_for(theirs: tuple[type[Theirs], str]) -> None:
    """Each byte comes in time, all of them do not: it is left before the last."""
    kind, url = theirs
    sent = 0

    def slowly(self: Theirs) -> None:
        nonlocal sent
        self.send_response(200)
        self.end_headers()
        for byte in THEIRS[:40]:
            self.wfile.write(bytes([byte]))
            sent += 1
            time.sleep(scrape.SECONDS / 8)

    kind.do_GET = slowly  # type: ignore[method-assign]
    assert scraped(url) is None
    assert sent < 40


def test_nobody_there_is_no_metrics() -> None:
    assert scraped("http://127.0.0.1:9/metrics") is None


def test_they_stand_behind_our_own(
    server: Running, theirs: tuple[type[Theirs], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, url = theirs
    monkeypatch.setattr(type(server.service.scorer), "metrics_url", property(lambda _: url))

    text = server.client.get("/metrics").text
    assert text.endswith(THEIRS.decode())
    assert 'plexrank_scorer_scrapes_total{result="taken"} 1.0' in text
    assert list(text_string_to_metric_families(text))
    kind.status = 503
    text = server.client.get("/metrics").text
    assert 'plexrank_scorer_scrapes_total{result="failed"} 1.0' in text
    assert "nv_inference_count" not in text
    assert "plexrank_ranked_items_count" in text
