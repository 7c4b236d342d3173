"""`plexrank serve`, and the same answers once, without a server: `plexrank rank`, `plexrank recommend`."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from rich.console import Console
from rich.table import Table

from engine.deadline import Deadline
from engine.errors import PlexrankError
from engine.loading import load_config
from engine.pipeline import Answer, Query
from serving.app import serve_with
from serving.auth import check_address, token_from
from serving.codec import encode_answer
from serving.protocol import BoundedProtocol, bound
from serving.server import Server
from serving.service import Service

log = logging.getLogger("plexrank.serving")

BundlePath = Annotated[Path, typer.Argument(help="the folder of a trained bundle", exists=True, file_okay=False)]
StateDir = Annotated[Path, typer.Option(help="where users' states and the log of events are kept")]
_ONCE_SECONDS = 10.0
SWITCH_SECONDS = 0.0005
"""Longest time that a thread keeps the interpreter while another waits for it; Python's own is ten times as long."""


def serve(
    bundle: Annotated[
        Path | None, typer.Argument(help="the folder of a trained bundle", exists=True, file_okay=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="a configuration whose section 'serving' is taken")] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="a registry: its current bundle is served in place of BUNDLE, with a learner's deltas"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="address; one that others reach needs a token")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: any free one")] = None,
    state_dir: StateDir = Path("state"),
    insecure: Annotated[bool, typer.Option("--insecure", help="let everybody in, without a token")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Serve a bundle over HTTP: rankings, recommendations, events, explanations, and the page at /.

    SIGHUP loads the bundle's folder again; SIGTERM lets running requests end.
    """
    logging.basicConfig(level=log_level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    serving = None if config is None else load_config(config).serving
    if bundle is None and models is None and (serving is None or serving.models is None):
        raise typer.BadParameter("name a bundle, or a registry with --models", param_hint="BUNDLE")
    service = Service.open(bundle, serving, state_dir, models=models)
    settings = service.config
    host, port = host or settings.host, settings.port if port is None else port
    try:
        check_address(host, token_from(settings.token_env), insecure)
        sock = bound(host, port)
        app = serve_with(service, insecure=insecure)
    except PlexrankError:
        service.close()
        raise
    _reload_on_hangup(app.state.server)
    # A request that gave the interpreter up inside torch gets it back soon, whatever applies a delta beside it.
    sys.setswitchinterval(SWITCH_SECONDS)
    # What was loaded stays: the collector need not walk it again and again between requests.
    gc.collect()
    gc.freeze()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level=log_level,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=10,
            http=BoundedProtocol,
        )
    )
    with sock, suppress(KeyboardInterrupt):
        server.run(sockets=[sock])


def _reload_on_hangup(server: Server) -> None:
    def load() -> None:
        try:
            server.load()
        except PlexrankError as error:
            log.error("the bundle is refused, the one before goes on: %s", error)

    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=load, daemon=True).start())


def rank(
    bundle: BundlePath,
    items: Annotated[str, typer.Option(help="item ids, with commas between")],
    user: Annotated[str, typer.Option(help="whose history counts")] = "",
    json: Annotated[bool, typer.Option("--json", help="print the answer of POST /v1/rank")] = False,
) -> None:
    """Order items for a user, once, with what the bundle knows of the user."""
    wanted = [item.strip() for item in items.split(",") if item.strip()]
    _once(bundle, json, lambda service, query: service.rank(query, wanted, {}), user)


def recommend(
    bundle: BundlePath,
    user: Annotated[str, typer.Option(help="who it is for")] = "",
    count: Annotated[int, typer.Option(min=1, max=500, help="items wanted")] = 10,
    json: Annotated[bool, typer.Option("--json", help="print the answer of POST /v1/recommend")] = False,
) -> None:
    """Find items for a user, once, with what the bundle knows of the user."""
    _once(bundle, json, lambda service, query: service.recommend(query, count, ()), user)


def _once(bundle: Path, as_json: bool, ask: Any, user: str) -> None:
    """One answer over a state that is thrown away: that of the bundle's users."""
    with tempfile.TemporaryDirectory(prefix="plexrank-") as folder:
        service = Service.open(bundle, None, Path(folder))
        try:
            answer: Answer = ask(service, Query("once", Deadline(_ONCE_SECONDS), user))
            if as_json:
                print(encode_answer(answer).decode())
            else:
                _print(service, answer)
        finally:
            service.close()


def _print(service: Service, answer: Answer) -> None:
    table = Table("", "item", "title", "score", title=f"{answer.model} {answer.version}")
    catalogue = service.pipeline.served.catalogue
    for place, (item, row) in enumerate(zip(answer.items, catalogue.rows(answer.items).tolist(), strict=True)):
        title = catalogue.title(row) if row >= 0 else "(not in the catalogue)"
        table.add_row(str(place + 1), item, title, f"{answer.scores[place]:.4f}")
    Console().print(table)
    for reason in answer.degraded:
        Console(stderr=True).print(f"degraded: {reason}", markup=False)
