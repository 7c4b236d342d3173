"""A real headless Chromium over a real server: every page is watched for console errors and foreign requests."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from fastapi import FastAPI
from film_world import FilmConsole

from serving.playground import router

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium_path() -> str | None:
    named = os.environ.get("PLEXRANK_CHROMIUM")
    return named or next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    path = chromium_path()
    if path is None:
        reason = "no Chromium: apt-get install chromium, or name one in PLEXRANK_CHROMIUM"
        if os.environ.get("PLEXRANK_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


def serve(app: FastAPI) -> tuple[str, Callable[[], None]]:
    """Runs an application on a free port of this machine -> (origin, stop)."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    for _ in range(1200):
        if server.started:
            break
        time.sleep(0.05)
    assert server.started, "the server did not start within a minute"

    def stop() -> None:
        server.should_exit = True
        thread.join(timeout=20)
        sock.close()

    return f"http://127.0.0.1:{sock.getsockname()[1]}", stop


@dataclass
class Watch:
    """What a page said and asked for while it was open."""

    origin: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def attach(self, page: object) -> None:
        page.on("console", lambda m: m.type in ("error", "warning") and self.errors.append(m.text))
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith(self.origin) else self.foreign.append(r.url))

    def check(self) -> None:
        unexpected = [e for e in self.errors if not any(part in e for part in self.expected)]
        assert not unexpected, f"the console has errors: {unexpected}"
        assert not self.foreign, f"requests left the origin: {self.foreign}"


@dataclass
class Site:
    origin: str
    console: FilmConsole


@pytest.fixture
def site() -> Iterator[Site]:
    """The page over the small world of films."""
    console = FilmConsole()
    app = FastAPI()
    app.include_router(router(console))
    origin, stop = serve(app)
    yield Site(origin, console)
    stop()


@pytest.fixture
def watch(site: Site) -> Iterator[Watch]:
    """Fails the test at its end if the page erred or called elsewhere."""
    seen = Watch(site.origin)
    yield seen
    seen.check()


@pytest.fixture
def open_page(browser: object, site: Site, watch: Watch) -> Iterator[Callable[..., object]]:
    """open_page(path, width=1280, dark=False, scripts=True) -> a watched page."""
    contexts = []

    def open_(
        path: str = "/", width: int = 1280, *, dark: bool = False, scripts: bool = True, still: bool = True
    ) -> object:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce" if still else "no-preference",
            java_script_enabled=scripts,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        watch.attach(page)
        page.goto(site.origin + path)
        return page

    yield open_
    for context in contexts:
        context.close()
