"""A hash table over fingerprints, looked up and filled by whole arrays."""

from __future__ import annotations

import numpy as np

_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth, TAOCP 6.4)
_LOAD = 0.6


class PrintIndex:
    """int64 fingerprints -> int64 rows >= 0, in open addressing with triangular probing.

    Entries are replaced and never removed: who keeps the rows knows which are gone, and calls `rebuild` now and then.
    """

    def __init__(self) -> None:
        self._clear(1024)

    def __len__(self) -> int:
        """Entries, also those of rows that are gone."""
        return self._used

    def get(self, prints: np.ndarray) -> np.ndarray:
        """Rows int64 [n], -1 where there is none."""
        found = np.full(len(prints), -1, np.int64)
        places, keys, at = np.arange(len(prints)), prints, self._home(prints)
        step = 1
        while len(places):
            rows = self._rows[at]
            there = rows >= 0
            same = there & (self._keys[at] == keys)
            found[places[same]] = rows[same]
            on = there & ~same
            places, keys, at = places[on], keys[on], (at[on] + step) & self._mask
            step += 1
        return found

    def put(self, prints: np.ndarray, rows: np.ndarray) -> None:
        """Sets the rows of fingerprints that are distinct within the call."""
        if self._used + len(prints) > _LOAD * len(self._keys):
            held = self._rows >= 0
            old_keys, old_rows = self._keys[held], self._rows[held]
            self._clear(len(old_keys) + len(prints))
            self._put(old_keys, old_rows)
        self._put(prints, rows)

    def rebuild(self, prints: np.ndarray, rows: np.ndarray) -> None:
        """Holds exactly these from now on."""
        self._clear(len(prints))
        self._put(prints, rows)

    def _clear(self, entries: int) -> None:
        bits = max(10, int(np.ceil(np.log2(max(1, entries) * 2.5))))
        self._keys = np.zeros(1 << bits, np.int64)
        self._rows = np.full(1 << bits, -1, np.int64)
        self._mask, self._shift, self._used = (1 << bits) - 1, np.uint64(64 - bits), 0

    def _home(self, prints: np.ndarray) -> np.ndarray:
        return ((np.asarray(prints, np.int64).view(np.uint64) * _SPREAD) >> self._shift).view(np.int64)

    def _put(self, keys: np.ndarray, rows: np.ndarray) -> None:
        at = self._home(keys)
        step = 1
        while len(keys):
            free = self._rows[at] < 0
            self._keys[at[free]] = keys[free]  # of several that want one place, one stays
            mine = self._keys[at] == keys
            self._used += int((mine & free).sum())
            self._rows[at[mine]] = rows[mine]
            on = ~mine
            keys, rows, at = keys[on], rows[on], (at[on] + step) & self._mask
            step += 1
