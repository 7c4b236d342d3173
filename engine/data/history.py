"""Users' histories from the log, with no look ahead: what a row may see has a strictly earlier time.

Equal times are one page: what was shown and clicked together cannot explain itself.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from engine.data.order import IN_MEMORY, bucket_count, deal
from engine.data.store import CHUNK, Store, chunks


def build_histories(store: Store, users: int, item_rank: np.ndarray, max_length: int, limit: int = IN_MEMORY) -> None:
    """Groups rows by user; writes where each row's history lies.

    past int64 [P]: rows of positives, user by user, newest first (ties: the order of (time, user, item), reversed).
    past_start int64 [n], past_length int32 [n]: the slice of `past` that a row sees, at most `max_length` long.
    user_past, user_rows int64 [users + 1, 2]: each user's slices of `past` and `by_user`; by_user int64 [n]: all rows,
    user by user, oldest first. Rows without a user have no history. Positive: the first task's label is above 0.
    """
    user = store["user"]
    rows = len(user)
    buckets = bucket_count(rows, limit)
    by_user = store.create("by_user", "i8", (rows,))
    start = store.create("past_start", "i8", (rows,))
    length = store.create("past_length", "i4", (rows,))
    user_rows = store.create("user_rows", "i8", (users + 1, 2))
    user_past = store.create("user_past", "i8", (users + 1, 2))
    offsets = deal(rows, buckets, lambda part: (user[part].astype(np.int64) + 1) % buckets, by_user)
    with store.appender("past", "i8") as past:
        for begin, end in pairwise(offsets):
            if begin == end:
                continue
            part = by_user[begin:end].copy()
            part = part[np.lexsort((item_rank[store["item"][part]], store["time"][part], user[part]))]
            by_user[begin:end] = part
            _bucket(store, part, int(begin), past.rows, (start, length, user_rows, user_past), max_length)
            owner = user[part]
            positive = (store["labels"][part, 0] > 0) & (owner >= 0)
            chosen = part[positive]
            # newest first within each user: reverse all, then users back in order
            past.append(chosen[::-1][np.argsort(user[chosen[::-1]], kind="stable")])


def _bucket(
    store: Store,
    part: np.ndarray,
    begin: int,
    base: int,
    out: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    max_length: int,
) -> None:
    """part: rows sorted by (user, time, item). base: where this bucket's positives begin in `past`."""
    start, length, user_rows, user_past = out
    owner, time = store["user"][part], store["time"][part]
    positive = (store["labels"][part, 0] > 0) & (owner >= 0)
    before = np.concatenate([[0], np.cumsum(positive)])  # positives before each place
    new_user = np.concatenate([[True], owner[1:] != owner[:-1]])
    new_page = new_user | np.concatenate([[True], time[1:] != time[:-1]])
    first_of_user = np.flatnonzero(new_user)
    group = np.cumsum(new_user) - 1
    user_end = np.append(first_of_user[1:], len(part))
    page = np.flatnonzero(new_page)[np.cumsum(new_page) - 1]
    earlier = before[page] - before[first_of_user[group]]
    # newest first: the user's positives end at `stop`, so those before this page begin `earlier` before it
    stop = before[user_end[group]]
    start[part] = base + before[first_of_user[group]] + (stop - before[page])
    length[part] = np.where(owner >= 0, np.minimum(earlier, max_length), 0)
    who = owner[first_of_user]
    user_rows[who, 0], user_rows[who, 1] = begin + first_of_user, begin + user_end
    user_past[who, 0], user_past[who, 1] = base + before[first_of_user], base + before[user_end]


def user_tail_codes(store: Store, validation: float, test: float) -> None:
    """Writes `code` uint8 [n]: of each user's rows, oldest first, the last part is test (2), before it validation (1).

    A user of m rows has the test part from place ceil(m (1 - test)); rows without a user are one user.
    """
    by_user, user_rows = store["by_user"], store["user_rows"]
    code = store.create("code", "u1", (len(by_user),))
    for part in chunks(len(by_user), CHUNK):
        rows = by_user[part]
        owner = store["user"][rows]
        begin, end = user_rows[owner, 0], user_rows[owner, 1]
        place = np.arange(part.start, part.stop) - begin
        count = end - begin
        first_test = np.ceil(count * (1 - test) - 1e-9)
        first_validation = np.ceil(count * (1 - test - validation) - 1e-9)
        code[rows] = (place >= first_test).astype(np.uint8) + (place >= first_validation)
