"""A user's state as one value: how interactions enter it, and its bytes. Shared by all stores, so that they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.components import UserState
from engine.errors import PlexrankError

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[dict[str, Any], list[str], list[int], list[str]]).decode


def pack(state: UserState) -> bytes:
    """MessagePack of (features, history, times, seen); the user's name is the key, not part of the value."""
    return _encode((state.features, state.history, state.times, state.seen))


def unpack(user: str, value: bytes | None) -> UserState:
    """The state that `pack` wrote; None gives an empty one."""
    if value is None:
        return UserState(user)
    try:
        features, history, times, seen = _decode(value)
    except msgspec.DecodeError as error:
        raise PlexrankError(f"the stored state of a user is not readable: {error}") from error
    return UserState(user, features, history, times, seen)


def capped(state: UserState, history_cap: int, seen_cap: int) -> UserState:
    """The newest part of a state that is put as a whole."""
    return UserState(
        state.user,
        dict(state.features),
        list(state.history[:history_cap]),
        [int(time) for time in state.times[:history_cap]],
        list(state.seen[:seen_cap]),
    )


def add(
    state: UserState,
    items: Sequence[str],
    times: Sequence[int],
    *,
    positive: bool,
    history_cap: int,
    seen_cap: int,
) -> UserState:
    """Interactions enter a state: positives the history, in order of time (newest first), all of them `seen`.

    An interaction that comes late takes its place in time; of equal times the last to come is the newest. One that is
    there already (same item, same second) is left out, so that a log can be replayed without harm.
    """
    for item, time in zip(items, times, strict=True):
        if positive:
            _insert(state, item, int(time))
        if item in state.seen:
            state.seen.remove(item)
        state.seen.insert(0, item)
    del state.history[history_cap:], state.times[history_cap:], state.seen[seen_cap:]
    return state


def _insert(state: UserState, item: str, time: int) -> None:
    times = state.times
    place = 0
    while place < len(times) and times[place] > time:
        place += 1
    same = place
    while same < len(times) and times[same] == time:
        if state.history[same] == item:
            return
        same += 1
    state.history.insert(place, item)
    times.insert(place, time)


def merged(features: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Features after an update: new values replace, null removes."""
    both = {**features, **changes}
    return {name: value for name, value in both.items() if value is not None}
