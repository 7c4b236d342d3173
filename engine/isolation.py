"""Runs a plugin's code apart from the request that asked for it: within a budget, and no more once it keeps failing.

Each plugin has a few daemon threads of its own, so one that stalls can fill neither another's nor the process's exit. A
call past its budget goes on unheard in its thread; while it does, and for a while after several failures in a row, the
plugin is suspended and costs nothing. (Native code that holds the interpreter's lock cannot be cut off by a thread.)
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

THREADS = 4
"""Threads a plugin; calls beyond them are failures of kind `busy`."""
FAILURES = 3
"""Failures in a row that suspend a plugin."""
PAUSE_SECONDS = 30.0
"""How long it is suspended; the first call after that decides whether it comes back."""


class Failure(Exception):
    """A call that brought no answer. `kind`: error, timeout, shape, busy or suspended."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class _Call:
    """One call and where its outcome lands."""

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.function = function
        self.arguments = arguments
        self.done = threading.Event()
        self.late = False
        self.answer: Any = None
        self.error: BaseException | None = None


class Isolated:
    """The calls of one plugin."""

    def __init__(self, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[_Call]] = []
        self._threads = 0
        self._late = 0
        self._in_a_row = 0
        self._suspended_until = 0.0

    def call(
        self,
        function: Callable[..., Any],
        arguments: dict[str, Any],
        budget: float,
        wrong: Callable[[Any], str | None] | None = None,
    ) -> Any:
        """The function's answer, or Failure. `budget` in seconds; `wrong` names the fault of an answer, or None."""
        call = _Call(function, arguments)
        self._inbox().put(call)
        if not call.done.wait(budget):
            with self._lock:
                if not call.done.is_set():
                    call.late = True
                    self._late += 1
            if call.late:
                raise self._failed("timeout", f"took more than {budget:g} s")
        if call.error is not None:
            raise self._failed("error", f"{type(call.error).__name__}: {call.error}") from call.error
        why = wrong(call.answer) if wrong else None
        if why is not None:
            raise self._failed("shape", why)
        with self._lock:
            self._in_a_row = 0
        return call.answer

    @property
    def suspended(self) -> bool:
        """Whether a call now would be refused without being made."""
        with self._lock:
            return bool(self._late) or self._clock() < self._suspended_until

    def _inbox(self) -> queue.SimpleQueue[_Call]:
        with self._lock:
            if self._late:
                raise Failure("suspended", "an earlier call has not come back")
            if self._clock() < self._suspended_until:
                raise Failure("suspended", f"failed {self._in_a_row} times in a row")
            if self._idle:
                return self._idle.pop()
            if self._threads >= THREADS:
                raise Failure("busy", f"{THREADS} calls are under way")
            self._threads += 1
        inbox: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(inbox,), name=f"plexrank-{self.name}", daemon=True).start()
        return inbox

    def _failed(self, kind: str, why: str) -> Failure:
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row >= FAILURES:
                self._suspended_until = self._clock() + PAUSE_SECONDS
                why += f"; failed {self._in_a_row} times in a row, suspended for {PAUSE_SECONDS:g} s"
        return Failure(kind, why)

    def _work(self, inbox: queue.SimpleQueue[_Call]) -> None:
        while True:
            call = inbox.get()
            try:
                call.answer = call.function(**call.arguments)
            except BaseException as error:  # also SystemExit: a plugin must not end the process
                call.error = error
            with self._lock:
                if call.late:
                    self._late -= 1
                self._idle.append(inbox)
                call.done.set()
            del call
