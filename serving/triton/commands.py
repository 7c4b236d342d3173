"""What brings models into Triton: `plexrank export triton`, `plexrank triton deploy` and `plexrank triton follow`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.commands.output import JsonFlag, print_json

app = typer.Typer(no_args_is_help=True, help="Write a bundle in the form that another server loads.")

BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder of a trained bundle.", exists=True, file_okay=False)
]
RepositoryArgument = Annotated[
    Path, typer.Argument(metavar="REPOSITORY", help="Model repository; made if it is not there.", file_okay=False)
]
Config = Annotated[
    Path | None,
    typer.Option(help="Configuration whose serving.triton holds; default: as exported before, or the bundle's."),
]
Name = Annotated[str | None, typer.Option(help="Of the model in Triton; default: the bundle's.")]
Instances = Annotated[int | None, typer.Option(min=1, help="Processes a version.")]
Delay = Annotated[int | None, typer.Option(min=0, help="Microseconds a request may wait for others.")]
MaxBatch = Annotated[int | None, typer.Option(min=1, help="Most requests that are scored together.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Torch threads an instance.")]
Versions = Annotated[int | None, typer.Option(min=1, help="Newest versions that are kept and answer.")]
Live = Annotated[str | None, typer.Option(help="Folder of the memory that deltas are applied to; default beside.")]
Variant = Annotated[str | None, typer.Option(help="eager, or aoti: compiled for processors like this one.")]
Tables = Annotated[str | None, typer.Option(help="float32, or int8: a byte a number.")]
Tolerance = Annotated[float | None, typer.Option(min=0.0, help="Largest difference of scores that is accepted.")]
VectorsMb = Annotated[int | None, typer.Option(min=0, help="Most memory for items' vectors, MiB.")]
Url = Annotated[str, typer.Option(help="Triton's gRPC, host:port.")]


@app.callback()
def _group() -> None:
    """So that `triton` stays a command of its own."""


@app.command("triton")
def export_triton(
    bundle: BundleArgument,
    repository: RepositoryArgument,
    name: Name = None,
    config: Config = None,
    instances: Instances = None,
    batch_delay_us: Delay = None,
    max_batch: MaxBatch = None,
    threads: Threads = None,
    versions: Versions = None,
    live: Live = None,
    item_vectors_mb: VectorsMb = None,
    variant: Variant = None,
    tables: Tables = None,
    tolerance: Tolerance = None,
    json: JsonFlag = False,
) -> None:
    """Write a bundle into a Triton model repository, as the next version of its model.

    Its scores are compared with the in-process scorer's first. A Triton that runs takes it with `plexrank triton
    deploy` in place of this.
    """
    from serving.triton.export import export

    given = _given(locals())
    found = export(_wish(bundle, name, config, given), repository)
    if json:
        print_json(_said(found))
    else:
        print(_told(found))


def deploy(
    bundle: BundleArgument,
    repository: RepositoryArgument,
    url: Url = "127.0.0.1:8001",
    name: Name = None,
    config: Config = None,
    instances: Instances = None,
    batch_delay_us: Delay = None,
    max_batch: MaxBatch = None,
    threads: Threads = None,
    versions: Versions = None,
    live: Live = None,
    item_vectors_mb: VectorsMb = None,
    variant: Variant = None,
    tables: Tables = None,
    tolerance: Tolerance = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that loading may take.")] = 600.0,
    json: JsonFlag = False,
) -> None:
    """Bring a bundle into a Triton that runs, without a lost request: the old version serves until the new one answers.

    To go back, deploy the older bundle. A server that others reach wants the secret in PLEXRANK_TRITON_CONTROL.
    """
    from serving.triton.client import TritonClient
    from serving.triton.deploy import deploy as bring

    given = _given(locals())
    with TritonClient(url) as client:
        found = bring(_wish(bundle, name, config, given), repository, client, timeout=timeout)
    if json:
        print_json({**_said(found.exported), "seconds": round(found.seconds, 3), "removed": list(found.removed)})
        return
    gone = f"; removed: {', '.join(map(str, found.removed))}" if found.removed else ""
    print(f"{_told(found.exported)}; answers after {found.seconds:.1f} s{gone}")


def follow(
    repository: RepositoryArgument,
    models: Annotated[Path, typer.Option(help="Registry whose promoted bundles and deltas are followed.")],
    url: Url = "127.0.0.1:8001",
    name: Name = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration with serving.event_log and serving.triton; default: bundle's.")
    ] = None,
    state_dir: Annotated[Path, typer.Option(help="The server's, where the event log is in a folder of it.")] = Path(
        "state"
    ),
    log_level: Annotated[str, typer.Option(help="debug (each delta), info, warning or error.")] = "info",
) -> None:
    """Keep a Triton at the newest version: deploy each promoted bundle, apply a learner's deltas as they come.

    Runs until it is terminated, beside one Triton; waits for what is not there yet. `plexrank triton status` shows how
    it stands.
    """
    import logging
    import signal

    from engine.loading import load_config
    from engine.plugins import installed
    from engine.streaming.deltas.registry import ModelRegistry
    from serving.triton.client import TritonClient
    from serving.triton.follow import Following

    logging.getLogger("plexrank").setLevel(log_level.upper())
    loaded = None if config is None else load_config(config)
    plugins = installed()
    if loaded is not None:
        plugins.enable(loaded.plugins)
    with TritonClient(url) as client:
        following = Following(
            repository,
            ModelRegistry(models, None if loaded is None else loaded.name),
            client,
            state_dir,
            name=name,
            event_log=None if loaded is None else loaded.serving.event_log,
            stated=None if loaded is None else loaded.serving.triton,
            plugins=plugins,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: following.stop())
        following.run()


def _given(named: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line that were given, of those that are settings."""
    from engine.config_triton import TritonConfig

    return {name: named[name] for name in TritonConfig.model_fields if named.get(name) is not None}


def _wish(bundle: Path, name: str | None, config: Path | None, given: dict[str, Any]) -> Any:
    from engine.loading import load_config
    from serving.triton.export import Wish

    stated = None if config is None else load_config(config).serving.triton
    return Wish(bundle, name, given, stated)


def _said(found: Any) -> dict[str, Any]:
    return {
        "model": found.model,
        "number": found.number,
        "version": found.version,
        "folder": found.folder,
        "new": found.new,
        "config_changed": found.changed,
        "others": list(found.others),
    }


def _told(found: Any) -> str:
    what = f"{found.model} {found.version}"
    where = f"version {found.number} ({found.folder})"
    text = f"{what}: {'is' if found.new else 'is already'} {where}"
    if found.others:
        text += f"; it was version {', '.join(map(str, found.others))} before"
    return text + ("; config.pbtxt changed" if found.changed and not found.new else "")
