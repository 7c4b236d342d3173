"""One contract, two stores: what is written by one handle is read by another, capped, ordered, erasable."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.components import StateStore, UserState
from engine.errors import PlexrankError, PluginError
from engine.testing import check_state_store
from plugins.state.record import add, pack, unpack
from plugins.state.redis import RedisStateStore
from plugins.state.sqlite import SqliteStateStore

Open = Callable[..., StateStore]


def test_an_unknown_user_has_an_empty_state(open_store: Open) -> None:
    assert open_store().get("nobody") == UserState("nobody")


def test_the_history_is_newest_first_whatever_the_order_of_arrival(open_store: Open) -> None:
    store = open_store()
    store.append("u", ["b", "d"], [20, 40], positive=True)
    store.append("u", ["a", "c"], [10, 30], positive=True)  # late
    state = store.get("u")
    assert (state.history, state.times) == (["d", "c", "b", "a"], [40, 30, 20, 10])


def test_of_equal_times_the_last_to_come_is_the_newest(open_store: Open) -> None:
    store = open_store()
    store.append("u", ["a"], [10], positive=True)
    store.append("u", ["b"], [10], positive=True)
    assert store.get("u").history == ["b", "a"]


def test_an_interaction_that_comes_twice_counts_once(open_store: Open) -> None:
    store = open_store()
    for _ in range(2):
        store.append("u", ["a", "b"], [10, 20], positive=True)
    assert store.get("u").history == ["b", "a"]
    store.append("u", ["a"], [30], positive=True)  # another visit to the same item
    assert store.get("u").history == ["a", "b", "a"]


def test_the_history_keeps_the_newest_up_to_its_cap(open_store: Open) -> None:
    store = open_store(cap=3)
    store.append("u", list("abcdef"), [1, 2, 3, 4, 5, 6], positive=True)
    state = store.get("u")
    assert (state.history, state.times) == (["f", "e", "d"], [6, 5, 4])
    store.append("u", ["old"], [0], positive=True)
    assert store.get("u").history == ["f", "e", "d"]


def test_a_negative_interaction_is_seen_but_no_history(open_store: Open) -> None:
    store = open_store()
    store.append("u", ["shown"], [10], positive=False)
    store.append("u", ["clicked"], [20], positive=True)
    state = store.get("u")
    assert state.history == ["clicked"]
    assert set(state.seen) == {"shown", "clicked"}


def test_seen_is_distinct_and_capped(open_store: Open) -> None:
    store = open_store(seen_cap=2)
    store.append("u", ["a", "b", "a", "c"], [1, 2, 3, 4], positive=False)
    assert store.get("u").seen == ["c", "a"]


def test_features_merge_and_null_removes_one(open_store: Open) -> None:
    store = open_store()
    store.update("u", {"age": 30, "tags": ["x", "y"]})
    store.append("u", ["a"], [1], positive=True)
    store.update("u", {"age": 31, "tags": None, "city": "Köln"})
    state = store.get("u")
    assert state.features == {"age": 31, "city": "Köln"}
    assert state.history == ["a"]


def test_put_replaces_a_whole_state_and_caps_it(open_store: Open) -> None:
    store = open_store(cap=2)
    store.append("u", ["x"], [99], positive=True)
    store.put([UserState("u", {"k": 1.5}, ["c", "b", "a"], [3, 2, 1], ["c"]), UserState("v")])
    assert store.get("u") == UserState("u", {"k": 1.5}, ["c", "b"], [3, 2], ["c"])
    assert store.users() == ["u", "v"]


def test_put_takes_more_users_than_one_chunk(open_store: Open) -> None:
    store = open_store()
    store.put([UserState(f"u{n:05d}", {}, ["a"], [n], []) for n in range(6001)])
    assert store.get("u06000").times == [6000]
    assert len(store.users(limit=10_000)) == 6001


def test_a_deleted_user_is_gone_and_says_whether_there_was_one(open_store: Open) -> None:
    store = open_store()
    store.append("u", ["a"], [1], positive=True)
    assert store.delete("u") is True
    assert store.delete("u") is False
    assert store.get("u") == UserState("u")
    assert store.users() == []


def test_users_are_listed_in_order_by_prefix_up_to_a_limit(open_store: Open) -> None:
    store = open_store()
    store.put([UserState(name) for name in ["b2", "a", "b10", "b1", "ü1", "c"]])
    assert store.users() == ["a", "b1", "b10", "b2", "c", "ü1"]
    assert store.users(limit=2, prefix="b") == ["b1", "b10"]
    assert store.users(prefix="ü") == ["ü1"]
    assert store.users(prefix="%") == []


@pytest.mark.parametrize("user", ["用户-1", "a/b?c=d&e", "' OR 1=1 --", "x" * 256, "\U0001f98a", "users", "*"])
def test_any_text_names_a_user(open_store: Open, user: str) -> None:
    store = open_store()
    store.append(user, [user], [7], positive=True)
    assert store.get(user).history == [user]
    assert store.users() == [user]
    assert store.delete(user)


def test_another_handle_reads_what_one_wrote(open_store: Open) -> None:
    open_store().append("u", ["a"], [1], positive=True)
    assert open_store().get("u").history == ["a"]


def test_no_click_is_lost_between_writers_of_two_handles(open_store: Open) -> None:
    stores = [open_store(cap=1000), open_store(cap=1000)]

    def write(worker: int) -> None:
        for n in range(25):
            stores[worker % 2].append("u", [f"{worker}-{n}"], [n], positive=True)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(stores[0].get("u").history) == {f"{w}-{n}" for w in range(4) for n in range(25)}


def test_a_reader_always_sees_a_whole_state(open_store: Open) -> None:
    store = open_store(cap=50)
    stop = threading.Event()
    torn: list[UserState] = []

    def read() -> None:
        while not stop.is_set():
            state = store.get("u")
            if len(state.history) != len(state.times):
                torn.append(state)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(200):
        store.append("u", [str(n)], [n], positive=True)
    stop.set()
    reader.join()
    assert torn == []


def test_an_erased_users_bytes_leave_the_sqlite_files(tmp_path: Path) -> None:
    store = SqliteStateStore(SqliteStateStore.Options(path=str(tmp_path / "s.db")), 10)
    store.put([UserState(f"other{n}", {}, ["i"], [1], []) for n in range(50)])
    store.append("needle-in-a-file", ["secret-item"], [1], positive=True)
    store.delete("needle-in-a-file")
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    store.close()
    assert b"needle-in-a-file" not in held
    assert b"secret-item" not in held


def test_a_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(PlexrankError, match=r"state\.db is not usable as a state store"):
        SqliteStateStore(SqliteStateStore.Options(path=str(path)), 10)


def test_sqlite_runs_in_write_ahead_mode(tmp_path: Path) -> None:
    SqliteStateStore(SqliteStateStore.Options(path=str(tmp_path / "s.db")), 10)
    with sqlite3.connect(tmp_path / "s.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_threads_that_come_and_go_leave_no_open_files(tmp_path: Path) -> None:
    store = SqliteStateStore(SqliteStateStore.Options(path=str(tmp_path / "s.db")), 10)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(100):
        thread = threading.Thread(
            target=lambda n=number: (store.append(f"u{n}", ["a"], [1], positive=True), store.get("u"))
        )
        thread.start()
        thread.join()
    assert len(store.users(1000)) == 100
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    store.close()


def test_a_commit_that_fails_leaves_the_store_usable(tmp_path: Path) -> None:
    store = SqliteStateStore(SqliteStateStore.Options(path=str(tmp_path / "s.db")), 10)
    with store._connection() as connection:
        connection.execute("PRAGMA max_page_count=4")  # as on a full disk
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.update("u", {"text": "x" * 100_000})
    store.append("v", ["a"], [1], positive=True)
    assert store.get("v").history == ["a"]
    assert store.get("u") == UserState("u")
    store.close()


def test_a_redis_that_is_not_there_fails_within_its_timeout() -> None:
    store = RedisStateStore(RedisStateStore.Options(url="redis://127.0.0.1:1/0", timeout_ms=50), 10)
    with pytest.raises(Exception, match=r"(?i)refused|connect"):
        store.get("u")


def test_a_redis_address_named_by_an_unset_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_URL", raising=False)
    with pytest.raises(PluginError, match="NO_SUCH_URL is not set"):
        RedisStateStore(RedisStateStore.Options(url_env="NO_SUCH_URL"), 10)


def test_a_damaged_record_is_an_error_with_words() -> None:
    with pytest.raises(PlexrankError, match="not readable"):
        unpack("u", b"\xc1\xff")
    assert unpack("u", pack(UserState("u", {"a": None}, ["x"], [1], []))).features == {"a": None}


def test_adding_is_the_same_in_one_call_or_in_many() -> None:
    items, times = list("abcdefgh"), [5, 3, 8, 1, 9, 2, 7, 4]
    at_once = add(UserState("u"), items, times, positive=True, history_cap=4, seen_cap=3)
    one_by_one = UserState("u")
    for item, time in zip(items, times, strict=True):
        add(one_by_one, [item], [time], positive=True, history_cap=4, seen_cap=3)
    by_time = [item for _, item in sorted(zip(times, items, strict=True), reverse=True)]
    assert at_once.history == one_by_one.history == by_time[:4]


def test_redis_keeps_the_contract_of_state_stores(redis_port: int) -> None:
    check_state_store(RedisStateStore, {"url": f"redis://127.0.0.1:{redis_port}/0", "prefix": "contract:"})


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="url_env") as refused:
        RedisStateStore.Options(url="redis://:secret@127.0.0.1/0")
    assert "secret" not in str(refused.value)
