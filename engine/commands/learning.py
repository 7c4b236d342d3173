"""`plexrank learn`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer

from engine.commands.output import JsonFlag, Progress, print_figures, print_json
from engine.commands.training import ConfigArgument, SetOption, overrides_of
from engine.errors import EventError

T = TypeVar("T")


def learn(
    config: ConfigArgument,
    bundle: Annotated[Path | None, typer.Option(help="The bundle to go on from.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder of models: deltas and bundles are published, servers follow.")
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option(
            "--from",
            "--reset-to",
            help="Where to begin: checkpoint (the newest; the default where there is one), or leave it and begin from "
            "the bundle: at the earliest or the latest record, at the bundle's own positions (bundle), at offsets "
            "(0:1200,1:900), or at a time (ISO 8601, or milliseconds since 1970).",
        ),
    ] = None,
    until: Annotated[
        str,
        typer.Option(help="live: until interrupted; end: of the log as it is now; or offsets, or a time, as --from."),
    ] = "live",
    out: Annotated[Path | None, typer.Option(help="Checkpoints, report, bundle; default runs/NAME-learner.")] = None,
    state_dir: Annotated[Path, typer.Option(help="The server's, where the log is in a folder of it.")] = Path("state"),
    partitions: Annotated[str | None, typer.Option(help="Partitions of the log, as in 0,2; default all.")] = None,
    share: Annotated[
        str | None, typer.Option(help="K/N: every N-th partition, from K on; 0/2 and 1/2 are two.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Share the partitions out with all learners of this name (learning.group).")
    ] = None,
    audit: Annotated[Path | None, typer.Option(help="File that gets which example was trained at which step.")] = None,
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Prometheus metrics on 127.0.0.1.")] = None,
    set_: SetOption = None,
    json: JsonFlag = False,
) -> None:
    """Learn from the event log, and publish what was learnt.

    Events are joined to examples and train the model of --bundle, or of the registry --models, where row deltas are
    published for servers that follow. It goes on from its newest checkpoint under --out, also after kill -9. A registry
    without a model takes --bundle as its first.
    """
    from engine.loading import load_config, located
    from engine.plugins import installed
    from engine.streaming.deltas.registry import ModelRegistry
    from engine.streaming.events.open_log import open_log
    from engine.streaming.learning.group_learner import GroupLearner
    from engine.streaming.learning.learner import Learner
    from engine.streaming.learning.learner_metrics import LearnerMetrics
    from engine.streaming.learning.span import start_of, until_of

    if bundle is None and models is None:
        raise typer.BadParameter("give --bundle or --models", param_hint="--bundle")
    loaded = load_config(
        config, overrides_of([*(set_ or []), *([] if group is None else [f"learning.group={group}"])], None)
    )
    start, end = None if begin is None else _said(start_of, begin, "--from"), _said(until_of, until, "--until")
    if loaded.learning.group is not None and (start is not None or end not in ("live", "end")):
        raise typer.BadParameter(
            "a group learns each partition from where it left it, live or up to the end; another name begins anew",
            param_hint="--from" if start is not None else "--until",
        )
    plugins = installed()
    plugins.enable(loaded.plugins)
    metrics = LearnerMetrics()
    if metrics_port is not None:
        metrics.serve(metrics_port)
    log = open_log(plugins, loaded.serving.event_log, state_dir, read_only=True)
    with located(config), Progress() as progress:
        try:
            learner = (Learner if loaded.learning.group is None else GroupLearner)(
                loaded,
                log,
                out or Path("runs") / f"{loaded.name}-learner",
                plugins=plugins,
                bundle=bundle,
                registry=None if models is None else ModelRegistry(models, loaded.name),
                partitions=chosen(partitions, share, sorted(log.ends())),
                start=start,
                audit=audit,
                locks=state_dir / "learners",
                metrics=metrics,
                progress=progress,
            )
            try:
                _stop_on_signals(learner)
                summary = learner.run(end)
            finally:
                learner.close()
        finally:
            log.close()
    print_json(summary) if json else print_figures(_lines(summary))


def chosen(partitions: str | None, share: str | None, there: list[int]) -> list[int] | None:
    """`0,2`, or the share `1/2` of those that are there; None: all. Usage errors for what is neither."""
    if partitions is not None and share is not None:
        raise typer.BadParameter("give --partitions or --share, not both", param_hint="--partitions")
    if partitions is not None:
        parts = partitions.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise typer.BadParameter(f"'{partitions}' is no list of partitions, as in 0,2", param_hint="--partitions")
        return [int(part) for part in parts]
    if share is None:
        return None
    which, slash, of = share.partition("/")
    if not (slash and which.isdecimal() and of.isdecimal() and int(which) < int(of)):
        raise typer.BadParameter(f"'{share}' is not K/N with K < N, as in 0/2", param_hint="--share")
    return [p for p in there if p % int(of) == int(which)]


def _said(read: Callable[[str], T], text: str, option: str) -> T:
    """What an option says; wrong usage where it says nothing."""
    try:
        return read(text)
    except EventError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _stop_on_signals(learner: Any) -> None:
    """Interrupted or terminated, it writes a checkpoint and says its counts."""

    def stop(number: int, frame: FrameType | None) -> None:
        learner.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _lines(summary: dict[str, Any]) -> dict[str, Any]:
    """Nested counts as `events.in`."""
    flat = {k: v for k, v in summary.items() if not isinstance(v, dict)}
    for name in ("events", "examples", "seconds"):
        flat |= {f"{name}.{key}": value for key, value in summary[name].items()}
    return flat
