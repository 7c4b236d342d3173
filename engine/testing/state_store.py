"""The contract of state stores."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from engine.components import StateStore, UserState
from engine.testing.contract import Contract, Options

CAP = 5


def check_state_store(cls: type[StateStore], options: Options = None) -> None:
    """Histories in order of time and capped, features merged, users listed and erased, many threads at once.

    An option `path` that is not given leads into a temporary folder. A store on a server should be given one that is
    empty: the users whose names begin with `check-` are erased.
    """
    with tempfile.TemporaryDirectory() as folder:
        contract = Contract("state_stores", cls, placed(cls, options, Path(folder) / "state"))
        with contract.when("when it was made"):
            store = cls(contract.options, CAP)
        try:
            for name in store.users(limit=1000, prefix="check-"):
                store.delete(name)
            _interactions(contract, store)
            _features(contract, store)
            _many(contract, store)
            _threads(contract, store)
        finally:
            store.close()


def placed(cls: type[Any], options: Options, path: Path) -> Options:
    """The options with `path` set, where the plugin has such an option and it was not given."""
    has_path = "path" in cls.Options.model_fields
    if not has_path or not (options is None or isinstance(options, dict)) or "path" in (options or {}):
        return options
    return {**(options or {}), "path": str(path)}


def _interactions(contract: Contract, store: StateStore) -> None:
    with contract.when("reading an unknown user"):
        empty = store.get("check-nobody")
    contract.holds(empty == UserState("check-nobody"), "must give an empty state for an unknown user")
    with contract.when("in append"):
        store.append("check-a", ["i1", "i2"], [100, 200], positive=True)
        store.append("check-a", ["i3"], [300], positive=False)
        store.append("check-a", [], [], positive=True)
    state = store.get("check-a")
    contract.holds(state.history == ["i2", "i1"], "must keep positives in the history, newest first")
    contract.holds(state.times == [200, 100], "must keep the time of each history item")
    contract.holds(set(state.seen) == {"i1", "i2", "i3"}, "must keep all interactions in `seen`, also negative ones")
    store.append("check-a", [f"j{n}" for n in range(9)], list(range(1000, 1009)), positive=True)
    contract.holds(
        store.get("check-a").history == ["j8", "j7", "j6", "j5", "j4"], f"must keep the newest {CAP} of a history"
    )
    contract.holds(store.delete("check-a"), "must say True when it erases a user")
    contract.holds(store.get("check-a") == UserState("check-a"), "must know nothing of an erased user")
    contract.holds(not store.delete("check-a"), "must say False when there is nothing to erase")


def _features(contract: Contract, store: StateStore) -> None:
    state = UserState("check-b", {"age": 31, "tags": ["x", "ü"], "score": 0.5}, ["i1"], [7], ["i1", "i2"])
    with contract.when("in put"):
        store.put([state, UserState("check-c")])
    contract.holds(store.get("check-b") == state, "must give back the state that was put")
    with contract.when("in update"):
        store.update("check-b", {"age": 32, "tags": None})
        store.update("check-new", {"age": 1})
    contract.holds(store.get("check-b").features == {"age": 32, "score": 0.5}, "must merge features, None removing one")
    contract.holds(store.get("check-b").history == ["i1"], "must leave the history alone when features change")
    contract.holds(store.get("check-new").features == {"age": 1}, "must make the user whose features are set")


def _many(contract: Contract, store: StateStore) -> None:
    store.put([UserState(f"check-m{n}", {}, ["i"], [1], ["i"]) for n in range(20)])
    with contract.when("listing users"):
        some = store.users(limit=7, prefix="check-m")
    contract.holds(len(some) == 7 and len(set(some)) == 7, "must list as many users as asked for")
    contract.holds(all(name.startswith("check-m") for name in some), "must list users of the prefix asked for")
    contract.holds(store.users(prefix="check-m1") != [], "must find users by a longer prefix")
    contract.holds(store.users(prefix="no-such-prefix-") == [], "must list nobody where nobody has the prefix")


def _threads(contract: Contract, store: StateStore) -> None:
    def add(number: int) -> None:
        for step in range(10):
            store.append("check-t", [f"{number}.{step}"], [step], positive=False)
            store.get("check-t")

    contract.in_threads(add)
    contract.holds(len(set(store.get("check-t").seen)) == 40, "must lose nothing when many threads append to one user")
