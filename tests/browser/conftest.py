"""A real headless Chromium over a real server: every page is watched for console errors and foreign requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from fastapi import FastAPI
from film_world import FilmConsole
from live_page import Watch, absent, serve

from serving.playground import Playground, router

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
        absent("no Chromium: apt-get install chromium, or name one in PLEXRANK_CHROMIUM")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed: pip install -e '.[dev]'")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Site:
    origin: str
    console: FilmConsole


@pytest.fixture
def site() -> Iterator[Site]:
    """The page over the small world of films."""
    console = FilmConsole()
    app = FastAPI()
    app.include_router(router(Playground(console)))
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
