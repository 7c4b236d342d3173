"""State store `sqlite`: users in one file beside the server."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from engine.components import PluginOptions, StateStore, UserState
from engine.errors import PlexrankError
from engine.hookspecs import hookimpl
from plugins.state.record import add, capped, merged, pack, unpack

_SCHEMA = "CREATE TABLE IF NOT EXISTS users (user TEXT PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID"
_CHUNK = 5000


class SqliteStateStore(StateStore):
    """Users' histories in SQLite (write-ahead log): no server to run, survives kill -9.

    One row a user, one read a request. Readers never wait for a writer; each call borrows a connection, so there are as
    many as calls at once, however many threads come and go; writers take turns. An erased user's bytes are overwritten
    (`secure_delete`).
    """

    name = "sqlite"

    class Options(PluginOptions):
        path: str = Field("state.db", description="the file; relative to the server's state directory")
        seen_cap: int = Field(2000, ge=1, description="items kept a user to leave out what was seen")
        busy_ms: int = Field(1000, ge=0, description="how long a writer waits for another process's")
        durable: bool = Field(
            False, description="fsync each write; without it a power cut may lose the last ones, which the log restores"
        )

    options: Options

    def __init__(self, options: PluginOptions, history_cap: int) -> None:
        super().__init__(options, history_cap)
        self._write = threading.Lock()
        self._open = threading.Lock()
        self._connections: list[sqlite3.Connection] = []
        self._idle: list[sqlite3.Connection] = []  # the last to come back goes first: its cache is warm
        self._closed = False
        Path(self.options.path).parent.mkdir(parents=True, exist_ok=True)
        with self._connection():
            pass

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else uses meanwhile."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            yield connection
        finally:
            self._idle.append(connection)

    def _connect(self) -> sqlite3.Connection:
        with self._open:
            if self._closed:
                raise PlexrankError("the state store is closed")
            connection = None
            try:
                connection = sqlite3.connect(
                    self.options.path,
                    timeout=self.options.busy_ms / 1000,
                    isolation_level=None,
                    check_same_thread=False,
                )
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute(f"PRAGMA synchronous={'FULL' if self.options.durable else 'NORMAL'}")
                connection.execute("PRAGMA secure_delete=ON")
                connection.execute(_SCHEMA)
            except sqlite3.Error as error:
                if connection is not None:
                    connection.close()
                raise PlexrankError(f"{self.options.path} is not usable as a state store: {error}") from error
            self._connections.append(connection)
        return connection

    def get(self, user: str) -> UserState:
        """One indexed read."""
        with self._connection() as connection:
            return _read(connection, user)

    def append(self, user: str, items: Sequence[str], times: Sequence[int], *, positive: bool) -> None:
        """Reads, adds and writes in one transaction."""
        with self._transaction() as connection:
            state = add(
                _read(connection, user),
                items,
                times,
                positive=positive,
                history_cap=self.history_cap,
                seen_cap=self.options.seen_cap,
            )
            _write(connection, [state])

    def update(self, user: str, features: Mapping[str, Any]) -> None:
        """Reads, merges and writes in one transaction."""
        with self._transaction() as connection:
            state = _read(connection, user)
            state.features = merged(state.features, features)
            _write(connection, [state])

    def put(self, states: Sequence[UserState]) -> None:
        """Whole states, some thousands a transaction."""
        for start in range(0, len(states), _CHUNK):
            with self._transaction() as connection:
                chunk = states[start : start + _CHUNK]
                _write(connection, [capped(s, self.history_cap, self.options.seen_cap) for s in chunk])

    def delete(self, user: str) -> bool:
        """Whether there was such a user."""
        with self._transaction() as connection:
            gone = connection.execute("DELETE FROM users WHERE user = ?", (user,)).rowcount > 0
        if gone:  # the write-ahead log still holds the old page
            with self._connection() as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return gone

    def users(self, limit: int = 100, prefix: str = "") -> list[str]:
        """Names in order of their bytes."""
        end = prefix + "\U0010ffff"  # the last text that starts so, in the order of UTF-8
        query = "SELECT user FROM users WHERE user >= ? AND user < ? ORDER BY user LIMIT ?"
        with self._connection() as connection:
            return [row[0] for row in connection.execute(query, (prefix, end, limit))]

    def close(self) -> None:
        """Closes all connections."""
        with self._write, self._open:
            self._closed = True
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self._idle.clear()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """`BEGIN IMMEDIATE` ... `COMMIT`, one at a time in this process; rolls back where the body raises."""
        with self._write, self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


def _read(connection: sqlite3.Connection, user: str) -> UserState:
    row = connection.execute("SELECT state FROM users WHERE user = ?", (user,)).fetchone()
    return unpack(user, row[0] if row else None)


def _write(connection: sqlite3.Connection, states: Sequence[UserState]) -> None:
    connection.executemany(
        "INSERT INTO users (user, state) VALUES (?, ?) ON CONFLICT (user) DO UPDATE SET state = excluded.state",
        [(state.user, pack(state)) for state in states],
    )


@hookimpl
def state_stores() -> list[type[StateStore]]:
    return [SqliteStateStore]
