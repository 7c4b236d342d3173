"""The page at `/`: choose a user, see the ranking and its reasons, click an item, watch the list re-order.

The page asks the pipeline in process, by the same calls as `/v1/recommend` and `/v1/events` (see `serving.console`).
It needs no script from elsewhere, and without scripts its links and forms still work.
"""

from __future__ import annotations

import hashlib
import logging
import mimetypes
import shlex
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Protocol, Self
from urllib.parse import parse_qs, quote

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from engine.components import UserState
from engine.errors import PlexrankError, RequestError
from serving import ranking_view as view
from serving.limits import read_body

log = logging.getLogger("plexrank.playground")

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "HX-Request",
}
COUNT = 20  # items in the list
HISTORY = 30  # history items beside it
USERS = 40  # users offered at once
VERSION = 100  # characters of a version
FORM_BYTES = 64 * 1024


class Console(Protocol):
    """What the page asks of the server behind it. All but `run` block, and are called through `run`."""

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's answer, off the event loop."""

    def about(self) -> Mapping[str, str]:
        """What serves: part -> plugin, for people (interest -> din)."""

    def learnt(self) -> str | None:
        """The version that answers now, where what serves follows a learner; None elsewhere. Does not block."""

    def users(self, prefix: str, limit: int) -> Sequence[UserState]: ...

    def user(self, user: str) -> UserState: ...

    def cards(self, ids: Sequence[str]) -> Mapping[str, view.Card]: ...

    def recommend(self, user: str, count: int) -> Mapping[str, Any]:
        """The answer of `/v1/recommend`, its stages in milliseconds."""

    def explain(self, request_id: str, count: int) -> Mapping[str, view.Reason]:
        """Item id -> why it is in that answer, of the first `count`."""

    def click(self, user: str, item: str, request_id: str) -> view.Receipt:
        """Sends an interaction; it is durable, and the history changed, when this returns."""


class Refusal(Exception):
    """A request that the page does not serve, with the status and words to answer."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.title, self.detail = status, title, detail


def _assets() -> dict[str, bytes]:
    """The static files by name, read once: the page never opens a path that a request names."""
    return {f.name: f.read_bytes() for f in resources.files("serving").joinpath("static").iterdir() if f.is_file()}


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%-d %b %Y") if seconds > 0 else ""


def _clock(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S")


def _templates(assets: Mapping[str, bytes]) -> Environment:
    """Everything is escaped; a name that a template does not get is an error, not an empty string."""
    env = Environment(
        loader=PackageLoader("serving"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digests = {name: hashlib.sha256(data).hexdigest()[:12] for name, data in assets.items()}
    env.globals["asset"] = lambda name: f"/static/{name}?v={digests[name]}"
    env.filters.update(day=_day, clock=_clock, key=view.key, quote=lambda text: quote(text, safe=""))
    return env


def same_origin(request: Request) -> bool:
    """Whether a state-changing request comes from this page (a browser always sends one of the two headers)."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin", "")
    return origin.partition("://")[2] == request.headers.get("host", "") != ""


async def form(request: Request) -> dict[str, str]:
    """A urlencoded form of bounded size -> its last values."""
    try:
        body = await read_body(request, FORM_BYTES)
    except RequestError as error:
        raise Refusal(error.status, "Not taken", str(error)) from None
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=20, errors="strict")
    except ValueError:
        raise Refusal(400, "Not a form", "The body is not a urlencoded form in UTF-8.") from None
    return {name: values[-1] for name, values in fields.items()}


def curl(base: str, path: str, body: Mapping[str, Any], token_env: str | None = None) -> str:
    """The same request as a line for a POSIX shell."""
    token = f'-H "Authorization: Bearer ${token_env}" ' if token_env else ""
    data = shlex.quote(orjson.dumps(body).decode())
    return f"curl -s {base}{path} -H 'content-type: application/json' {token}-d {data}"


@dataclass(frozen=True)
class Ask:
    """What a page's answer depends on besides the user: base, the server's address; part: htmx wants the main part."""

    base: str
    part: bool

    @classmethod
    def of(cls, request: Request) -> Self:
        return cls(str(request.base_url).rstrip("/"), request.headers.get("hx-request") == "true")


class Playground:
    """The page over one console. Keeps the newest receipts in memory for the event feed, nothing else."""

    def __init__(self, console: Console, token_env: str | None = None) -> None:
        self.console = console
        self.token_env = token_env
        self.assets = _assets()
        self.templates = _templates(self.assets)
        self.receipts: deque[view.Receipt] = deque(maxlen=200)

    def render(self, name: str, status: int = 200, **context: Any) -> HTMLResponse:
        html = self.templates.get_template(name).render(**context)
        return HTMLResponse(html, status_code=status, headers=HEADERS)

    def show(self, ask: Ask, user: str, before: str = "", receipt: view.Receipt | None = None) -> Response:
        """The ranking for a user, "" for none. before: the list that the browser shows; receipt: what it just sent."""
        try:
            stage = self._stage(ask, user, before) if user else {"user": "", "ranking": None}
            return self._page(ask, {**stage, "receipt": receipt})
        except Refusal as refusal:
            return self.refuse(ask, user, refusal, receipt)

    def click(self, ask: Ask, fields: Mapping[str, str]) -> Response:
        """Takes a click, then shows the ranking after it."""
        user, item = fields.get("user", ""), fields.get("item", "")
        try:
            if not user or not item:
                raise Refusal(422, "Incomplete", "A click needs a user and an item.")
            with _refusing("Event refused", "Event not taken"):
                receipt = self.console.click(user, item, fields.get("request_id", ""))
        except Refusal as refusal:
            return self.refuse(ask, user, refusal)
        self.receipts.appendleft(receipt)
        if not ask.part:
            return RedirectResponse(f"/?user={quote(user, safe='')}", status_code=303, headers=HEADERS)
        return self.show(ask, user, fields.get("shown", ""), receipt)

    def refuse(self, ask: Ask, user: str, refusal: Refusal, receipt: view.Receipt | None = None) -> Response:
        stage = {"user": user, "ranking": None, "problem": refusal, "receipt": receipt}
        return self._page(ask, stage, refusal.status)

    def version(self, shown: str) -> Response:
        """Whether the model has learnt since it scored the list that is shown, which is of this version."""
        learnt = self.console.learnt()
        if learnt is None:
            return Response(status_code=204, headers=HEADERS)
        return self.render("version.html", version=shown[:VERSION], learnt=learnt)

    def people(self, prefix: str) -> Response:
        """The users whose id begins so; the page's script marks the one that is shown."""
        return self.render("users.html", users=self.console.users(prefix, USERS), query=prefix, user="")

    def forget(self, user: str) -> None:
        """Drops a user's receipts."""
        for receipt in [receipt for receipt in self.receipts if receipt.user == user]:
            self.receipts.remove(receipt)

    def first(self) -> str:
        found = self.console.users("", 1)
        return found[0].user if found else ""

    def _stage(self, ask: Ask, user: str, before: str) -> dict[str, Any]:
        """What `stage.html` shows: the ranking, the history with its influence, the feed. Raises Refusal."""
        with _refusing("No ranking", "No ranking"):
            answer = self.console.recommend(user, COUNT)
            try:
                reasons = self.console.explain(answer["request_id"], COUNT)
            except PlexrankError as error:
                log.warning("no explanation: %s", error)
                reasons, answer = {}, {**answer, "degraded": [*answer["degraded"], "explain"]}
            state = self.console.user(user)
        ids = {item["id"] for item in answer["items"]} | set(state.history[:HISTORY])
        ids |= {item for reason in reasons.values() for item, _ in reason.history}
        cards = self.console.cards(sorted(ids))
        return {
            "user": user,
            "ranking": view.ranking(user, answer, reasons, cards, view.parse_shown(before)),
            "compared": bool(before),
            "version": answer["model"]["version"],
            "learnt": self.console.learnt(),
            "state": state,
            "history": [
                (cards.get(item) or view.Card(item, item), time)
                for item, time in zip(state.history[:HISTORY], [*state.times, *[0] * HISTORY], strict=False)
            ],
            "feed": [r for r in self.receipts if r.user == user][:12],
            "curl": curl(ask.base, "/v1/recommend", {"user": user, "count": COUNT}, self.token_env),
        }

    def _page(self, ask: Ask, stage: dict[str, Any], status: int = 200) -> Response:
        """The whole page, or its main part alone where htmx asks for it."""
        context = {"problem": None, **stage}
        if ask.part:
            return self.render("stage.html", status, **context)
        offered = list(self.console.users("", USERS))
        if stage["user"] and all(person.user != stage["user"] for person in offered):
            offered = [*(p for p in self.console.users(stage["user"], 1) if p.user == stage["user"]), *offered]
        return self.render("page.html", status, users=offered, query="", about=self.console.about(), **context)


@contextmanager
def _refusing(refused: str, failed: str) -> Iterator[None]:
    """Errors of the engine as refusals: the request's own fault with its status, else 503."""
    try:
        yield
    except RequestError as error:
        raise Refusal(error.status, refused, str(error)) from error
    except PlexrankError as error:
        log.exception("the page got no answer")
        raise Refusal(503, failed, str(error)) from error


def router(play: Playground) -> APIRouter:
    """The page's routes, to be mounted at the root; left out of the OpenAPI document, which is for programs."""
    console = play.console
    routes = APIRouter(include_in_schema=False)

    async def run(function: Callable[..., Response], *arguments: Any) -> Response:
        try:
            answer: Response = await console.run(function, *arguments)
        except RequestError as error:  # too many are being answered
            refusal = Refusal(error.status, "Busy", str(error))
            return play.render("stage.html", error.status, user="", ranking=None, receipt=None, problem=refusal)
        return answer

    @routes.get("/")
    async def index(request: Request, user: str | None = None) -> Response:
        """`?user=` chooses; without it the first user of the state store is shown."""
        ask = Ask.of(request)
        return await run(lambda: play.show(ask, play.first() if user is None else user.strip()))

    @routes.get("/playground/users")
    async def users(user: str = "") -> Response:
        return await run(play.people, user.strip())

    @routes.get("/playground/version")
    async def version(shown: str = "") -> Response:
        """Asked every second by each open page, so it takes no turn at the gate."""
        return play.version(shown)

    @routes.post("/playground/events")
    async def events(request: Request) -> Response:
        """A click: `user`, `item`, the request it answers and the list it saw (`shown`)."""
        ask = Ask.of(request)
        try:
            if not same_origin(request):
                raise Refusal(403, "Refused", "This request did not come from the page itself.")
            fields = await form(request)
        except Refusal as refusal:
            return await run(play.refuse, ask, "", refusal)
        return await run(play.click, ask, fields)

    @routes.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in play.assets:
            return Response("no such file", status_code=404, media_type="text/plain", headers=HEADERS)
        kind = "font/woff2" if name.endswith(".woff2") else mimetypes.guess_type(name)[0] or "text/plain"
        cache = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
        return Response(play.assets[name], media_type=kind, headers=cache)

    return routes
