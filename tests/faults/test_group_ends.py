"""A group of learners that learns a log up to its end, whoever of them is killed on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.brokers import Broker
from tests.faults.stream_world import World, each_once, fates, held, trained, world, zygote
from tests.streaming.film_stream import BEGIN, visits

__all__ = ["world", "zygote"]
JOIN = {"window_seconds": 20, "lateness_seconds": 5}


def test_a_group_ends_when_all_partitions_are_learnt_though_a_member_is_killed(
    tansu: Broker, world: Callable[..., World]
) -> None:
    """The first is killed with -9 in mid-stream, and the second learns up to where the log ended when it began. What
    is written after that is not of its run: the first learns it when it comes back."""
    its = world(tansu, partitions=4, join=JOIN, batch_size=16, chunk=20, checkpoint_seconds=0.1)
    streams = [visits(n, seed=n, begin=BEGIN + at) for n, at in ((800, 0), (100, 10_000), (50, 50_000))]
    streams[0].write(its.log)
    first = its.learn("--group", its.topic, out="first", end=True)
    its.until(lambda: sum(held(its, "first").values()) > 0, "the first learns")
    streams[1].write(its.log)
    ends = ended(its)
    second = its.learn("--group", its.topic, out="second", end=True)
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert any(at < ends[p] for p, at in held(its, "first").items())
    its.until(lambda: held(its, "second"), "the second has begun")
    streams[2].write(its.log)
    its.close_windows(BEGIN + 100_000)
    done = second.summary()
    assert done["positions"] == ends
    assert max(done["waiting"].values()) < 16, "no whole batch is left"

    again = its.learn("--group", its.topic, out="first", end=True).summary()
    assert (again["positions"], again["kept"]) == (ended(its), {})
    for events in (done["events"], again["events"]):
        assert events["in"] == sum(n for outcome, n in events.items() if outcome != "in")
    assert done["events"]["in"] + again["events"]["in"] == sum(ended(its).values())
    shown = sum(len(stream.shown) for stream in streams)
    assert sum(s["examples"]["joined"] for s in (done, again)) == shown
    counted = trained(its.audit("first"), its.audit("second"))
    each_once(counted)
    assert sum(counted.values()) + sum(again["waiting"].values()) == shown
    assert counted.keys() <= {(r, i, kind) for stream in streams for (r, i), kind in fates(stream).items()}
    assert min(s["examples"]["trained"] for s in (done, again)) > 0


def test_a_member_without_a_partition_waits_for_the_others(tansu: Broker, world: Callable[..., World]) -> None:
    """One partition, two members: whoever has it learns it, and both end; one that comes later ends at once."""
    its = world(tansu, partitions=1, join=JOIN, batch_size=16, chunk=20)
    stream = visits(300)
    stream.write(its.log)
    runs = [its.learn("--group", its.topic, out=name, end=True) for name in ("first", "second")]
    summaries = [run.summary() for run in runs]
    assert sum(s["events"]["in"] for s in summaries) == len(stream.events)
    late = its.learn("--group", its.topic, out="late", end=True).summary()
    assert late["events"]["in"] == 0


def ended(its: World) -> dict[str, int]:
    """Where the log ends now, as a summary has it."""
    return {str(p): end for p, end in its.log.ends().items()}
