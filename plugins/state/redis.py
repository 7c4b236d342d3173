"""State store `redis`: users shared by many servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from engine.components import PluginOptions, StateStore, UserState
from engine.errors import PlexrankError, PluginError
from engine.hookspecs import hookimpl
from plugins.state.record import add, capped, merged, pack, unpack

if TYPE_CHECKING:
    from redis.client import Pipeline

_CHUNK = 1000
_RETRIES = 50


class RedisStateStore(StateStore):
    """Users' histories in Redis, for several servers behind one balancer.

    One string a user (read with one GET) and one sorted set of names for listing. A change is optimistic (WATCH, MULTI,
    EXEC), so servers never lose each other's clicks. A server that does not answer within the timeout is an error of
    that call; rankings then go on without a history.
    """

    name = "redis"

    class Options(PluginOptions):
        model_config = ConfigDict(hide_input_in_errors=True)

        url: str = Field("redis://127.0.0.1:6379/0", description="address without a password; rediss:// for TLS")
        url_env: str | None = Field(None, description="environment variable with the address, for one with a password")
        prefix: str = Field("plexrank:", min_length=1, description="put before every key")
        timeout_ms: int = Field(50, ge=1, description="longest wait for an answer")
        seen_cap: int = Field(2000, ge=1, description="items kept a user to leave out what was seen")

        @field_validator("url")
        @classmethod
        def _no_password(cls, url: str) -> str:
            """Options are kept in bundles, which others may read."""
            if urlsplit(url).password:
                raise ValueError("has a password: put the address into an environment variable and name it in url_env")
            return url

    options: Options

    def __init__(self, options: PluginOptions, history_cap: int) -> None:
        super().__init__(options, history_cap)
        try:
            import redis
        except ImportError as error:
            raise PluginError("state store 'redis' needs the redis client: pip install 'plexrank[redis]'") from error
        url = self.options.url
        if self.options.url_env is not None:
            url = os.environ.get(self.options.url_env, "")
            if not url:
                raise PluginError(f"state store 'redis': the environment variable {self.options.url_env} is not set")
        seconds = self.options.timeout_ms / 1000
        self._conflict = redis.WatchError
        self._redis = redis.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds)
        self._names = f"{self.options.prefix}users"

    def _key(self, user: str) -> str:
        return f"{self.options.prefix}user:{user}"

    def get(self, user: str) -> UserState:
        """One GET."""
        return unpack(user, self._redis.get(self._key(user)))  # type: ignore[arg-type]

    def append(self, user: str, items: Sequence[str], times: Sequence[int], *, positive: bool) -> None:
        """Reads, adds and writes; again where another server was quicker."""
        self._change(
            user,
            lambda state: add(
                state,
                items,
                times,
                positive=positive,
                history_cap=self.history_cap,
                seen_cap=self.options.seen_cap,
            ),
        )

    def update(self, user: str, features: Mapping[str, Any]) -> None:
        """Reads, merges and writes; again where another server was quicker."""

        def change(state: UserState) -> UserState:
            state.features = merged(state.features, features)
            return state

        self._change(user, change)

    def _change(self, user: str, change: Callable[[UserState], UserState]) -> None:
        key = self._key(user)
        with self._redis.pipeline() as pipe:
            for _ in range(_RETRIES):
                try:
                    pipe.watch(key)
                    state = change(unpack(user, pipe.get(key)))  # type: ignore[arg-type]
                    pipe.multi()
                    self._store(pipe, state)
                    pipe.execute()
                    return
                except self._conflict:
                    continue
        raise PlexrankError(f"redis: {_RETRIES} attempts to change one user's state met another writer")

    def _store(self, pipe: Pipeline, state: UserState) -> None:
        pipe.set(self._key(state.user), pack(state))
        pipe.zadd(self._names, {state.user: 0})

    def put(self, states: Sequence[UserState]) -> None:
        """Whole states, a thousand a round trip."""
        for start in range(0, len(states), _CHUNK):
            with self._redis.pipeline(transaction=False) as pipe:
                for state in states[start : start + _CHUNK]:
                    self._store(pipe, capped(state, self.history_cap, self.options.seen_cap))
                pipe.execute()

    def delete(self, user: str) -> bool:
        """Whether there was such a user."""
        with self._redis.pipeline() as pipe:
            pipe.delete(self._key(user))
            pipe.zrem(self._names, user)
            return bool(pipe.execute()[0])

    def users(self, limit: int = 100, prefix: str = "") -> list[str]:
        """Names in order of their bytes."""
        start = b"[" + prefix.encode()
        end = start + b"\xff" if prefix else b"+"
        names: list[bytes] = self._redis.zrangebylex(self._names, start, end, 0, limit)  # type: ignore[assignment]
        return [name.decode() for name in names]

    def close(self) -> None:
        """Gives the connections back."""
        self._redis.close()


@hookimpl
def state_stores() -> list[type[StateStore]]:
    return [RedisStateStore]
