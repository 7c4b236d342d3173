"""A deadline that travels with a request, and threads that do not keep a process from ending."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Late(Exception):
    """A stage did not answer by its share of the deadline."""


class Deadline:
    """From `begin` to `end`, both of time.monotonic()."""

    def __init__(self, seconds: float, begin: float | None = None) -> None:
        self.begin = time.monotonic() if begin is None else begin
        self.end = self.begin + seconds

    def at(self, share: float) -> float:
        """When `share` of the whole time is used."""
        return self.begin + share * (self.end - self.begin)


class Workers:
    """A few threads for one sort of work: if it stalls, only these are held.

    They are daemons, so that what stalls cannot keep the process from ending; each begins when it is first needed.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._threads = name, threads
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = self._open = 0
        self._closed = False

    @property
    def open(self) -> int:
        """Calls that are queued or under way."""
        return self._open

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queues a call. The future's outcome is the function's; a cancelled one is not begun."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"workers '{self._name}' are closed")
            self._open += 1
            grow = self._started < self._threads and self._open > self._started
            if grow:
                self._started += 1
                number = self._started
        if grow:
            threading.Thread(target=self._work, name=f"plexrank-{self._name}-{number}", daemon=True).start()
        self._calls.put((future, function, arguments))
        return future

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                return
            future, function, arguments = call
            if future.set_running_or_notify_cancel():
                try:
                    answer = function(*arguments)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(answer)
            del call, future, function, arguments
            with self._lock:
                self._open -= 1
                if self._started > self._threads:
                    self._started -= 1
                    return

    def grow(self) -> None:
        """One thread more, because one is held by a call that is no longer waited for."""
        with self._lock:
            self._threads += 1

    def shrink(self) -> None:
        """One thread less, because it came back; said in that thread, which ends."""
        with self._lock:
            self._threads -= 1

    def close(self) -> None:
        """Queued calls are still made; then the threads end."""
        with self._lock:
            self._closed = True
            started = self._started
        for _ in range(started):
            self._calls.put(None)
