"""The plugin manager: built-ins and third parties come through one door, the entry-point group `plexrank`.

An entry point is named `kind.name`, as in `interests.din = "plugins.interest.din"`, or `moments.name` for a module of
moment hooks. So a configuration loads only the modules that it names, and a clash shows before anything is imported.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from engine import hookspecs
from engine.components import KINDS, Component
from engine.errors import PluginError

log = logging.getLogger("plexrank.plugins")

GROUP = "plexrank"
MOMENTS = ("on_train_step", "on_checkpoint", "on_publish", "on_event", "filter_candidates", "on_response")


@dataclass(frozen=True)
class PluginInfo:
    """A row of `plexrank plugins`."""

    kind: str
    name: str
    distribution: str
    version: str
    module: str
    summary: str = ""
    options: dict[str, Any] | None = None


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "0")


class Plugins:
    """The components and moment hooks that one configuration uses."""

    def __init__(self, points: Iterable[EntryPoint] | None = None, *, budget_seconds: float = 0.05) -> None:
        """points: entry points to choose from, by default those installed; budget_seconds: limit of a moment hook."""
        self.manager = pluggy.PluginManager("plexrank")
        self.manager.add_hookspecs(hookspecs)
        self.budget_seconds = budget_seconds
        self.errors: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()
        self._points: dict[str, dict[str, EntryPoint]] = {kind: {} for kind in (*KINDS, "moments")}
        self._classes: dict[tuple[str, str], type[Component]] = {}
        self._pool: ThreadPoolExecutor | None = None
        for point in entry_points(group=GROUP) if points is None else points:
            self._offer(point)

    def _offer(self, point: EntryPoint) -> None:
        kind, _, name = point.name.partition(".")
        if kind not in self._points or not name:
            dist, _ = _distribution(point)
            raise PluginError(
                f"{dist}: entry point '{point.name}' is not named 'kind.name'; kinds are {', '.join(self._points)}"
            )
        other = self._points[kind].get(name)
        if other is not None and other.value != point.value:
            raise PluginError(
                f"two plugins are named {kind}.{name}: one of distribution {_distribution(other)[0]} ({other.value}), "
                f"one of {_distribution(point)[0]} ({point.value}); rename or uninstall one"
            )
        self._points[kind][name] = point

    def names(self, kind: str) -> list[str]:
        """What can be named in a configuration for this kind."""
        return sorted(self._points[kind])

    def get(self, kind: str, name: str) -> type[Any]:
        """The component class; imports its module on first use. PluginError if there is none or it is broken."""
        with self._lock:
            cls = self._classes.get((kind, name))
            return cls if cls is not None else self._load(kind, name)

    def _load(self, kind: str, name: str) -> type[Component]:
        point = self._points[kind].get(name)
        if point is None:
            raise PluginError(unknown(kind, name, self.names(kind)))
        dist, _ = _distribution(point)
        module = _import(point)
        if not self.manager.is_registered(module):
            try:
                self.manager.register(module, name=point.value)
                self.manager.check_pending()
            except (pluggy.PluginValidationError, ValueError) as error:
                raise PluginError(f"{dist}: {point.value}: {error}") from error
        callers = [impl for impl in getattr(self.manager.hook, kind).get_hookimpls() if impl.plugin is module]
        offered = [cls for impl in callers for cls in impl.function()]
        for cls in offered:
            if not (isinstance(cls, type) and issubclass(cls, KINDS[kind])):
                raise PluginError(
                    f"{dist}: {point.value}: hook '{kind}' returned {cls!r}, not a {KINDS[kind].__name__}"
                )
            if cls.name == name:
                self._classes[(kind, name)] = cls
                return cls
        raise PluginError(
            f"{dist}: entry point {kind}.{name} leads to {point.value}, whose hook '{kind}' offers "
            f"{[cls.name for cls in offered] or 'nothing'}, not '{name}'"
        )

    def enable(self, names: Iterable[str]) -> None:
        """Registers the moment-hook modules that the configuration lists under `plugins`."""
        for name in names:
            point = self._points["moments"].get(name)
            if point is None:
                raise PluginError(unknown("moments", name, self.names("moments")))
            module = _import(point)
            if not self.manager.is_registered(module):
                self.manager.register(module, name=point.value)
                self.manager.check_pending()

    def notify(self, moment: str, **arguments: Any) -> list[Any]:
        """Fires a moment hook; what each plugin answered. One that fails is counted, named and left out.

        Each plugin has `budget_seconds`. One past it goes on in its own thread, unheard, and is skipped.
        """
        answers = []
        for impl in reversed(getattr(self.manager.hook, moment).get_hookimpls()):
            call = {name: arguments[name] for name in impl.argnames}
            future = self._workers().submit(impl.function, **call)
            try:
                answers.append(future.result(timeout=self.budget_seconds))
            except FutureTimeout:
                future.cancel()
                self._count(moment, impl.plugin_name, "timeout", f"took more than {self.budget_seconds:g} s")
            except Exception as error:
                self._count(moment, impl.plugin_name, "error", f"{type(error).__name__}: {error}")
        return answers

    def listens(self, moment: str) -> bool:
        """Whether any plugin hears this moment (so that hot paths can skip making arguments)."""
        return bool(getattr(self.manager.hook, moment).get_hookimpls())

    def reject(self, moment: str, plugin: str, why: str) -> None:
        """Counts an answer of the wrong shape."""
        self._count(moment, plugin, "shape", why)

    def _count(self, moment: str, plugin: str, kind: str, why: str) -> None:
        self.errors[(moment, plugin, kind)] += 1
        log.warning("plugin %s failed in %s and was skipped: %s", plugin, moment, why)

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="plexrank-moment")
        return self._pool

    def table(self) -> list[PluginInfo]:
        """All plugins that are installed, with their options; imports each. A broken one says so in its summary."""
        rows = []
        for kind, points in self._points.items():
            for name, point in sorted(points.items()):
                dist, version = _distribution(point)
                try:
                    if kind == "moments":
                        summary, options = (_import(point).__doc__ or "").strip().split("\n")[0], {}
                    else:
                        cls = self.get(kind, name)
                        summary, options = cls.summary(), cls.Options.model_json_schema().get("properties", {})
                except PluginError as error:
                    summary, options = f"broken: {error}", {}
                rows.append(PluginInfo(kind, name, dist, version, point.value, summary, options))
        return rows


@lru_cache(maxsize=1)
def installed() -> Plugins:
    """The plugins of this environment, read once a process; `enable` on it is for the process's one configuration."""
    return Plugins()


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """The message for a name that no plugin has."""
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"no plugin {kind}.{name}{hint} (installed: {', '.join(known) or 'none'})"


def _import(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        dist, _ = _distribution(point)
        raise PluginError(f"{dist}: {point.value} cannot be imported: {type(error).__name__}: {error}") from error
