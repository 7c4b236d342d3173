"""A group of learners that learns a log up to its end, whoever of them is killed on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.brokers import Broker
from tests.faults.stream_world import World, each_once, fates, held, trained, world, zygote
from tests.streaming.film_stream import BEGIN, visits

__all__ = ["world", "zygote"]
JOIN = {"window_seconds": 20, "lateness_seconds": 5}


@pytest.mark.parametrize("client", ["kafka", "kafka-fast"])
def test_a_group_ends_when_all_partitions_are_learnt_though_a_member_is_killed(
    client: str, tansu: Broker, world: Callable[..., World]
) -> None:
    """Two learners of four partitions; one is killed with -9 in mid-stream. What is written after they began is not
    theirs: the one that was killed learns it when it comes back."""
    its = world(tansu, partitions=4, client=client, join=JOIN, batch_size=16, chunk=20, checkpoint_seconds=0.1)
    stream, later = visits(1200), visits(100, seed=6, begin=BEGIN + 50_000)
    stream.write(its.log)
    ends = ended(its)
    first, second = (its.learn("--group", "films", out=name, end=True) for name in ("first", "second"))
    its.until(lambda: held(its, "first") and held(its, "second"), "both have partitions")
    later.write(its.log)
    its.close_windows(BEGIN + 100_000)
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert any(at < ends[p] for p, at in held(its, "first").items()), "it was killed in mid-stream"
    done = second.summary()
    assert done["positions"] == ends
    assert max(done["waiting"].values()) < 16, "no whole batch is left"

    again = its.learn("--group", "films", out="first", end=True).summary()
    assert (again["positions"], again["kept"]) == (ended(its), {})
    for events in (done["events"], again["events"]):
        assert events["in"] == sum(n for outcome, n in events.items() if outcome != "in")
    assert done["events"]["in"] + again["events"]["in"] == sum(ended(its).values())
    shown = len(stream.shown) + len(later.shown)
    assert sum(s["examples"]["joined"] for s in (done, again)) == shown
    counted = trained(its.audit("first"), its.audit("second"))
    each_once(counted)
    assert sum(counted.values()) + sum(again["waiting"].values()) == shown
    assert counted.keys() <= {(r, i, kind) for (r, i), kind in {**fates(stream), **fates(later)}.items()}
    assert min(its_["examples"]["trained"] for its_ in (done, again)) > 0


def ended(its: World) -> dict[str, int]:
    """Where the log ends now, as a summary has it."""
    return {str(p): end for p, end in its.log.ends().items()}
