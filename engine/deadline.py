"""A deadline that travels with a request, and workers whose answers are not waited for beyond it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any


class Late(Exception):
    """A stage did not answer by its share of the deadline."""


class Deadline:
    """From `begin` to `end`, both of time.monotonic()."""

    def __init__(self, seconds: float, begin: float | None = None) -> None:
        self.begin = time.monotonic() if begin is None else begin
        self.end = self.begin + seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of the whole time is used; 0 when it is."""
        return max(0.0, self.begin + share * (self.end - self.begin) - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left() <= 0.0


class Workers:
    """A few threads for one part of the pipeline: if it stalls, only its own threads are held.

    They are daemons, so that what stalls cannot keep the process from ending; each begins when it is first needed.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._threads = name, threads
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = self._open = 0  # open: calls that are queued or under way
        self._closed = False

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
            with self._lock:
                self._open -= 1
            del call, future, function, arguments

    def call(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's answer, or Late; what it raises is raised here."""
        if seconds <= 0.0:
            raise Late
        return wait(self.begin(function, *arguments), seconds)

    def close(self) -> None:
        """Queued calls are still made; then the threads end."""
        with self._lock:
            self._closed = True
            started = self._started
        for _ in range(started):
            self._calls.put(None)


def wait(future: Future[Any], seconds: float) -> Any:
    """The outcome of a worker; Late, and given up, after `seconds`."""
    try:
        return future.result(timeout=seconds)
    except FutureTimeout:
        if future.done():  # in the last moment, or the function itself raised a TimeoutError
            return future.result()
        future.cancel()
        raise Late from None
