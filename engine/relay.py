"""Runs requests stage by stage, each request in one thread, and goes on in another thread where a stage is late.

A request is a generator that yields its stages and gets their outcomes. Its stages run one after another in the thread
that took the request up, so a request that goes well changes threads only once. A watcher knows by when each stage has
to be done: past that, the stage is left behind with its thread, and another goes on with `Late` as the outcome.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any

from engine.deadline import Late, Workers

STUCK = 4
"""Calls of one part that may be left behind; while so many are, it is not called."""


@dataclass(frozen=True)
class Stage:
    """A call that may stall. part: whose code it is; until: time.monotonic() by which it must be done."""

    part: str
    until: float
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


Flow = Generator[Stage, Any, Any]


class _Task:
    """A request under way."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.future: Future[Any] = Future()


class _Ticket:
    """One running stage. Whoever takes the task out of it, the thread that ran it or the watcher, goes on with it."""

    __slots__ = ("part", "task")

    def __init__(self, task: _Task, part: str) -> None:
        self.task: _Task | None = task
        self.part = part


class Relay:
    """Threads for requests, and the watcher. `threads` at work, and for every call left behind one more."""

    def __init__(self, threads: int) -> None:
        self._workers = Workers("request", threads)
        self._stuck: Counter[str] = Counter()
        self._wake = threading.Condition()
        self._watched: list[tuple[float, int, _Ticket]] = []
        self._order = count()
        self._next = float("inf")
        self._closed = False
        threading.Thread(target=self._watch, name="plexrank-watch", daemon=True).start()

    def begin(self, flow: Flow) -> Future[Any]:
        """The future's outcome is what the flow returns or raises."""
        task = _Task(flow)
        self._workers.begin(self._drive, task, None)
        return task.future

    def stuck(self, part: str) -> int:
        """Calls of a part that were left behind and have not come back."""
        return self._stuck[part]

    def _drive(self, task: _Task, error: Exception | None) -> None:
        """Runs stages until the flow ends or another thread has taken the task over."""
        value: Any = None
        while True:
            try:
                stage = task.flow.throw(error) if error is not None else task.flow.send(value)
            except StopIteration as end:
                task.future.set_result(end.value)
                return
            except BaseException as raised:
                task.future.set_exception(raised)
                return
            value, error = None, None
            if stage.until <= time.monotonic() or self._stuck[stage.part] >= STUCK:
                error = Late()
                continue
            ticket = self._watched_until(stage.until, _Ticket(task, stage.part))
            try:
                value = stage.function(*stage.arguments)
            except Exception as raised:
                error = raised
            except BaseException as raised:  # SystemExit and its like: a plugin may not end a thread of ours
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
            with self._wake:
                mine, ticket.task = ticket.task is not None, None
                if not mine:
                    self._stuck[stage.part] -= 1
            if not mine:
                self._workers.shrink()
                return

    def _watched_until(self, until: float, ticket: _Ticket) -> _Ticket:
        with self._wake:
            heapq.heappush(self._watched, (until, next(self._order), ticket))
            if until < self._next:
                self._next = until
                self._wake.notify()
        return ticket

    def _watch(self) -> None:
        """Sleeps until the earliest stage that still runs is late. Stages that ended are cleared away in passing."""
        while True:
            with self._wake:
                while self._watched and self._watched[0][2].task is None:
                    heapq.heappop(self._watched)
                if self._closed:
                    return
                self._next = self._watched[0][0] if self._watched else float("inf")
                left = self._next - time.monotonic()
                if left > 0:
                    self._wake.wait(None if self._next == float("inf") else left)
                    continue
                ticket = heapq.heappop(self._watched)[2]
                task, ticket.task = ticket.task, None
                self._stuck[ticket.part] += 1
            self._workers.grow()
            assert task is not None
            self._workers.begin(self._drive, task, Late())
            del ticket, task

    def close(self) -> None:
        """Requests under way are still answered; the watcher ends when none is left behind."""
        self._workers.close()
        with self._wake:
            self._closed = True
            self._wake.notify()
