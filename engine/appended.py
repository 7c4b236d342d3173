"""Arrays that grow without a copy of what they hold; who holds a shorter one keeps it as it is."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np


class _Room(np.ndarray[Any, Any]):
    """Memory with free rows at its end; `used` are taken by the longest array over it."""

    used: int = 0


_taking = threading.Lock()


def appended(array: np.ndarray, more: np.ndarray) -> np.ndarray:
    """`array` [n, ...] with `more` [m, ...] behind it, of array's dtype: [n + m, ...].

    An array that came from here is lengthened in place: both share its rows. Any other, and one that was lengthened
    already, is copied, with a quarter of its rows to spare.
    """
    n, total = len(array), len(array) + len(more)
    room = _room_of(array)
    with _taking:
        if room is None or room.used != n or len(room) < total:
            room = np.ndarray.__new__(_Room, (total + total // 4, *array.shape[1:]), array.dtype)
            room[:n] = array
        room.used = total
    room[n:total] = more
    return room[:total].view(np.ndarray)


def _room_of(array: np.ndarray) -> _Room | None:
    """The memory that an array is the beginning of, where `appended` made it."""
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if not isinstance(owner, _Room) or owner.ctypes.data != array.ctypes.data:
        return None
    alike = (owner.dtype, owner.strides, owner.shape[1:]) == (array.dtype, array.strides, array.shape[1:])
    return owner if alike else None
