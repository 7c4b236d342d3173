"""`plexrank triton`: a Triton server on this machine, from install to down."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.commands.output import JsonFlag, print_figures, print_json, print_table
from engine.errors import PlexrankError
from serving.triton.commands import deploy, follow
from serving.triton.state import State, default_state

app = typer.Typer(no_args_is_help=True, help="Run a Triton Inference Server on this machine.")
app.command()(deploy)
app.command()(follow)

Repository = Annotated[Path, typer.Argument(help="Model repository, as `plexrank export triton` makes it.")]
StateFolder = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder of the server's state and logs; one server each.", show_default=False),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")]
_LOG = "supervisor.log"


@app.command()
def install(
    dir: Annotated[Path | None, typer.Option("--dir", help="Default: PLEXRANK_TRITON, or plexrank's cache.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="The wheel's file, for a machine without a package index.")] = None,
    json: JsonFlag = False,
) -> None:
    """Bring the server: 55 MB from the package index, for Linux on x86-64."""
    from serving.triton.wheel import NAME, VERSION, install_wheel

    found, brought = install_wheel(dir, wheel)
    if json:
        print_json(
            {"folder": found.folder, "package": f"{NAME}=={VERSION}", "brought": brought, "server": found.server}
        )
    else:
        print(f"{found.folder}: {NAME} {VERSION}{'' if brought else ' (was there)'}")


@app.command()
def up(
    repository: Repository,
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    host: Annotated[
        str, typer.Option(help="Address; others than this machine's get no control of models.")
    ] = "127.0.0.1",
    foreground: Annotated[
        bool, typer.Option("--foreground/--detach", help="Stay, with the log on stderr, or return when it is ready.")
    ] = False,
    dir: StateFolder = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds until models must answer.")] = 180.0,
    models: Annotated[
        Path | None,
        typer.Option(help="A registry: promoted bundles and deltas are followed, by `plexrank triton follow`."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="With --models: the configuration that `follow` gets.")] = None,
    state_dir: Annotated[
        Path, typer.Option(help="With --models: the gateway's, where the event log is in a folder of it.")
    ] = Path("state"),
    threads: Annotated[int, typer.Option(min=1, help="Of each model instance.")] = 1,
    wheel: Annotated[Path | None, typer.Option(help="Folder of `plexrank triton install --dir`.")] = None,
    json: JsonFlag = False,
) -> None:
    """Start the server, and keep its models answering until `down`."""
    folder = dir or default_state()
    if not foreground:
        _report(_detached(folder, timeout), folder, json)
        return
    from serving.triton.supervisor import Settings, Supervisor

    logging.getLogger("plexrank.triton").setLevel(logging.INFO)
    settings = Settings(
        repository, folder, wheel, host, http_port, grpc_port, metrics_port, timeout, threads, models, config, state_dir
    )
    Supervisor(settings, lambda state: _report(state, folder, json)).run()


def _detached(folder: Path, timeout: float) -> State:
    """The same command in a session of its own -> its state when it is ready. PlexrankError where it ends before."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOG).open("wb") as said:
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", "engine", *sys.argv[1:], "--foreground"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    until = time.monotonic() + timeout + 60.0
    while child.poll() is None and time.monotonic() < until:
        state = State.read(folder)
        if state is not None and state.supervisor.pid == child.pid and state.phase == "ready":
            return state
        time.sleep(0.05)
    child.terminate()
    lines = [line for line in (folder / _LOG).read_text(errors="replace").splitlines() if line.strip()]
    raise PlexrankError(lines[-1] if lines else f"it ended with {child.poll()} and said nothing")


def _report(state: State, folder: Path, json: bool) -> None:
    for model, fault in state.faults.items():
        print(f"{model}: not served: {fault}", file=sys.stderr)
    ready = [f"{m} ({', '.join(v.answers or n for n, v in vs.items())})" for m, vs in sorted(state.models.items())]
    if json:
        print_json({"url": state.url, "ports": state.ports, "pid": state.supervisor.pid, "dir": folder,
                    "models": {m: {n: v.answers for n, v in vs.items()} for m, vs in state.models.items()},
                    "faults": state.faults})  # fmt: skip
        return
    ports = ", ".join(f"{name} {number}" for name, number in state.ports.items())
    print(f"ready: {', '.join(ready) or 'no model yet'}\ngRPC on {state.url} (ports: {ports}); state in {folder}")
    sys.stdout.flush()


@app.command()
def down(dir: StateFolder = None, json: JsonFlag = False) -> None:
    """End the server; requests that it has begun are answered first."""
    from serving.triton.report import stop

    folder = dir or default_state()
    ended = stop(folder)
    if json:
        print_json({"dir": folder, "ended": ended})
    else:
        print(f"{folder}: process {ended} and its server ended" if ended else f"{folder}: no server runs")


@app.command()
def status(dir: StateFolder = None, json: JsonFlag = False) -> None:
    """Ask each model for a real inference; exit 1 unless all answer."""
    from serving.triton.report import examine

    folder = dir or default_state()
    found = examine(folder)
    if json:
        print_json(found)
    elif "models" not in found:
        print(found["reason"], file=sys.stderr)
    else:
        _print(found)
    raise typer.Exit(0 if found["ok"] else 1)


def _print(found: dict[str, Any]) -> None:
    rows = [
        (
            m["model"],
            m["version"],
            "ok" if m["ready"] else "wrong",
            m["answers"] or "-",
            m["milliseconds"],
            m["fault"] or "-",
        )
        for m in found["models"]
    ]
    print_table(["model", "triton version", "state", "answers as", "ms", "fault"], rows)
    if found["followed"]:
        columns = ("model", "number", "version", "applied", "rows", "age_seconds", "silent_seconds", "trouble")
        print_table(columns, [[its[column] for column in columns] for its in found["followed"]])
    ports = {f"{name} port": str(number) for name, number in found["ports"].items()}
    pids = {name: str(found[name]) for name in ("pid", "server_pid", "follower") if found.get(name)}
    faults = {f"fault of {name}": what for name, what in found["faults"].items()}
    print_figures({k: v for k, v in found.items() if k not in ("models", "ok", "followed")} | pids | ports | faults)
