"""The plugin manager: built-ins and third parties come through one door, the entry-point group `plexrank`.

An entry point is named `kind.name`, as in `interests.din = "plugins.interest.din"`, or `moments.name` for a module of
moment hooks. So a configuration loads only the modules that it names, and a clash shows before anything is imported.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np
import pluggy

from engine import hookspecs
from engine.components import KINDS, Component
from engine.errors import PluginError
from engine.isolation import Failure, Isolated

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
    options: dict[str, Any] = field(default_factory=dict)


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
        self._loading = threading.RLock()
        self._guard = threading.Lock()
        self._isolation: dict[str, Isolated] = {}
        self._points: dict[str, dict[str, EntryPoint]] = {kind: {} for kind in (*KINDS, "moments")}
        self._classes: dict[tuple[str, str], type[Component]] = {}
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
        if other is not None and (other.value, _distribution(other)) != (point.value, _distribution(point)):
            raise PluginError(
                f"two plugins are named {kind}.{name}: one of distribution {_distribution(other)[0]} ({other.value}), "
                f"one of {_distribution(point)[0]} ({point.value}); rename or uninstall one"
            )
        self._points[kind][name] = point

    def kinds(self) -> list[str]:
        """All kinds, `moments` among them."""
        return list(self._points)

    def names(self, kind: str) -> list[str]:
        """What can be named in a configuration for this kind."""
        return sorted(self._points[kind])

    def origin(self, kind: str, name: str) -> tuple[str, str]:
        """The distribution of a plugin and its version; nothing is imported."""
        point = self._points[kind].get(name)
        if point is None:
            raise PluginError(unknown(kind, name, self.names(kind)))
        return _distribution(point)

    def get(self, kind: str, name: str) -> type[Any]:
        """The component class; imports its module on first use. PluginError if there is none or it is broken."""
        with self._loading:
            cls = self._classes.get((kind, name))
            return cls if cls is not None else self._load(kind, name)

    def _load(self, kind: str, name: str) -> type[Component]:
        point = self._points[kind].get(name)
        if point is None:
            raise PluginError(unknown(kind, name, self.names(kind)))
        dist, _ = _distribution(point)
        module = _import(point)
        self._register(module, point)
        callers = [impl for impl in getattr(self.manager.hook, kind).get_hookimpls() if impl.plugin is module]
        offered = self._offered(callers, kind, point)
        for cls in offered:
            if cls.name == name:
                self._classes[(kind, name)] = cls
                return cls
        raise PluginError(
            f"{dist}: entry point {kind}.{name} leads to {point.value}, whose hook '{kind}' offers "
            f"{[cls.name for cls in offered] or 'nothing'}, not '{name}'"
        )

    @staticmethod
    def _offered(callers: Sequence[pluggy.HookImpl], kind: str, point: EntryPoint) -> list[type[Component]]:
        """The classes that a module's hook returns; PluginError if it raises or returns anything else."""
        where = f"{_distribution(point)[0]}: {point.value}: hook '{kind}'"
        offered: list[type[Component]] = []
        for impl in callers:
            try:
                returned: list[Any] = list(impl.function())  # type: ignore[call-overload]
            except Exception as error:
                raise PluginError(f"{where} raised {type(error).__name__}: {error}") from error
            for cls in returned:
                if not (isinstance(cls, type) and issubclass(cls, KINDS[kind])):
                    raise PluginError(f"{where} returned {cls!r}, not a subclass of {KINDS[kind].__name__}")
                if not isinstance(getattr(cls, "name", None), str):
                    raise PluginError(f"{where} returned {cls.__name__}, which has no `name`")
                offered.append(cls)
        return offered

    def _register(self, module: Any, point: EntryPoint) -> None:
        if self.manager.is_registered(module):
            return
        try:
            self.manager.register(module, name=point.value)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{_distribution(point)[0]}: {point.value}: {error}") from error

    def moment(self, name: str) -> Any:
        """The module of a moment-hook plugin, imported; PluginError if there is none or it is broken."""
        point = self._points["moments"].get(name)
        if point is None:
            raise PluginError(unknown("moments", name, self.names("moments")))
        return _import(point)

    def enable(self, names: Iterable[str]) -> None:
        """Registers the moment-hook modules that the configuration lists under `plugins`."""
        for name in names:
            self._register(self.moment(name), self._points["moments"][name])

    def notify(self, moment: str, **arguments: Any) -> list[Any]:
        """Fires a moment hook; what each plugin answered. One that fails is counted, named and left out."""
        return self._fire(moment, arguments)[0]

    def keep(self, user: str, items: Sequence[str], request: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
        """What `filter_candidates` leaves: bool [len(items)], and the plugins that failed and so do not filter.

        An answer that is not bool of the right length is named, counted and skipped.
        """

        def wrong(answer: Any) -> str | None:
            got = np.asarray(answer)
            fits = got.dtype == np.bool_ and got.shape == (len(items),)
            return None if fits else f"answered {got.dtype} of shape {got.shape}, not bool of shape ({len(items)},)"

        arguments = {"user": user, "items": items, "request": request}
        answers, failed = self._fire("filter_candidates", arguments, wrong)
        return np.logical_and.reduce([np.ones(len(items), dtype=bool), *answers]), failed

    def listens(self, moment: str) -> bool:
        """Whether any plugin hears this moment (so that hot paths can skip making arguments)."""
        return bool(getattr(self.manager.hook, moment).get_hookimpls())

    def _fire(
        self, moment: str, arguments: Mapping[str, Any], wrong: Callable[[Any], str | None] | None = None
    ) -> tuple[list[Any], list[str]]:
        """(answers, names of the plugins that failed), in the order of the configuration.

        Each plugin has `budget_seconds`. One past it is skipped, and suspended until that call comes back; one that
        fails several times in a row is suspended for a while (`engine.isolation`).
        """
        answers, failed = [], []
        for impl in getattr(self.manager.hook, moment).get_hookimpls():
            begin, outcome = time.perf_counter(), "ok"
            call = {name: arguments[name] for name in impl.argnames}
            try:
                answers.append(self._isolated(impl.plugin_name).call(impl.function, call, self.budget_seconds, wrong))
            except Failure as failure:
                outcome = failure.kind
                failed.append(impl.plugin_name)
                self._count(moment, impl.plugin_name, failure)
            trace(f"{moment} {impl.plugin_name}: {outcome}", begin)
        return answers, failed

    def _count(self, moment: str, plugin: str, failure: Failure) -> None:
        with self._guard:
            self.errors[(moment, plugin, failure.kind)] += 1
        level = logging.DEBUG if failure.kind == "suspended" else logging.WARNING  # said once, as the suspension began
        log.log(level, "plugin %s failed in %s and was skipped: %s", plugin, moment, failure)

    def _isolated(self, plugin: str) -> Isolated:
        with self._guard:
            if plugin not in self._isolation:
                self._isolation[plugin] = Isolated(plugin)
            return self._isolation[plugin]

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


def trace(what: str, begin: float) -> None:
    """One line on stderr a hook call and a load, with its time, where PLEXRANK_TRACE_PLUGINS is set."""
    if os.environ.get("PLEXRANK_TRACE_PLUGINS"):
        print(f"plexrank trace: {what} {1e3 * (time.perf_counter() - begin):.2f} ms", file=sys.stderr)


def _import(point: EntryPoint) -> Any:
    begin = time.perf_counter()
    try:
        module = point.load()
    except Exception as error:
        dist, _ = _distribution(point)
        raise PluginError(f"{dist}: {point.value} cannot be imported: {type(error).__name__}: {error}") from error
    trace(f"load {point.name} from {point.value} ({' '.join(_distribution(point))})", begin)
    return module
