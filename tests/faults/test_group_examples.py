"""A group that joins, publishes and writes examples down, and a group that trains from those examples."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from engine.bundle import Bundle
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.join.examples import decode_examples
from tests.brokers import Broker
from tests.faults.stream_world import LearnerRun, World, each_once, fates, held, trained, world, zygote
from tests.streaming.film_stream import BEGIN, visits
from tests.streaming.test_learner_publishing import put, same

__all__ = ["world", "zygote"]
JOIN = {"window_seconds": 20, "lateness_seconds": 5}
FROM_EXAMPLES = ("--set", "learning.source=examples", "--set", "learning.write_examples=false")


def test_what_a_group_publishes_and_writes_down_is_what_its_members_trained(
    tansu: Broker, world: Callable[..., World]
) -> None:
    """One of two members publishes, is killed with -9 and comes back. A third that wants to publish, too, is refused.
    Then a group of readers trains from the examples, and one of its members is killed as well."""
    its = world(
        tansu,
        partitions=4,
        client="kafka-fast",
        join=JOIN,
        batch_size=16,
        chunk=20,
        checkpoint_seconds=0.2,
        write_examples=True,
    )
    stream = visits(800)
    its.registry.publish(its.bundle, 1, "begun")
    publisher, other = learn(its, "publisher", publish=True, end=False), learn(its, "other", end=False)
    its.until((its.registry.folder / ".publisher").exists, "one publishes")
    third = learn(its, "third", publish=True)
    assert third.wait() == 1
    assert "publishes this model already" in " ".join(third.said().split())
    its.forget(third)
    its.until(lambda: held(its, "publisher") and held(its, "other"), "both have partitions")
    stream.write(its.log)
    its.close_windows(BEGIN + 100_000)
    its.until(lambda: sum(held(its, "publisher").values()) > 0, "it learns")
    kill(publisher)
    summaries = [learn(its, "publisher", publish=True).summary(), other.end()]

    counted = trained(its.audit("publisher"), its.audit("other"))
    of_all = added_up(summaries, counted)
    assert of_all["in"] == sum(its.log.ends().values())
    assert of_all["joined"] == len(stream.shown)
    assert counted.keys() <= {(r, i, kind) for (r, i), kind in fates(stream).items()}
    assert min(s["examples"]["trained"] for s in summaries) > 0
    check_chain(its, summaries[0])

    written, copies = examples(its)
    assert written == counted.keys(), "what was trained was written"
    readers = [learn(its, name, *FROM_EXAMPLES) for name in ("reader0", "reader1")]
    its.until(lambda: held(its, "reader0"), "it reads examples")
    kill(readers[0])
    summaries = [run.summary() for run in (learn(its, "reader0", *FROM_EXAMPLES), readers[1])]
    read = trained(its.audit("reader0"), its.audit("reader1"))
    of_all = added_up(summaries, read)
    assert of_all["in"] == len(written) + copies
    assert of_all["joined"] == len(written)
    assert sum(s["events"]["duplicates"] for s in summaries) == copies
    assert read.keys() <= written


def learn(its: World, name: str, *more: str, publish: bool = False, end: bool = True) -> LearnerRun:
    return its.learn("--group", its.topic, *more, out=name, publish=publish, end=end)


def kill(run: LearnerRun) -> None:
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


def added_up(summaries: list[dict[str, Any]], counted: Counter[tuple[int, int, int]]) -> Counter[str]:
    """Over all members: in = trained + waiting + what trains nothing, nothing twice. -> in, joined."""
    each_once(counted)
    for summary in summaries:
        events = summary["events"]
        assert events["in"] == sum(n for outcome, n in events.items() if outcome != "in")
    whole = Counter({"in": sum(s["events"]["in"] for s in summaries)})
    for summary in summaries:
        whole.update({name: summary["examples"][name] for name in ("joined", "trained")})
    waiting = {**summaries[0]["waiting"], **summaries[1]["waiting"]}  # kept ones stand as the other took them up
    assert whole["joined"] == whole["trained"] + sum(waiting.values())
    assert whole["trained"] == sum(counted.values())
    return whole


def check_chain(its: World, summary: dict[str, Any]) -> None:
    """The deltas on the first bundle are the last one, as one publisher wrote it in two lives."""
    state = {n: v.clone() for n, v in Bundle.open(its.bundle).frozen_tensors().items()}
    assembler, sequences = Assembler(), []
    for record in its.records("deltas"):
        delta = assembler.add(record.value)
        if delta is not None and delta.base == Bundle.open(its.bundle).version:
            put(state, delta)
            sequences.append(delta.sequence)
    assert sequences == list(range(1, len(sequences) + 1))
    assert len(sequences) > 5
    pointer = its.registry.current()
    assert pointer is not None
    last = Bundle.open(its.registry.bundle(pointer.version))
    same(state, last.frozen_tensors())
    assert last.manifest.metrics["learning"]["trained"] == summary["examples"]["trained"]


def examples(its: World) -> tuple[set[tuple[int, int, int]], int]:
    """(request, item, kind) of all that was written down, and how many copies beside, in the partition of the first."""
    encoder, found = Bundle.open(its.bundle).encoder, Counter[tuple[int, int, int]]()
    partitions = set[tuple[tuple[int, int, int], int]]()
    for record in its.records("examples"):
        joined = decode_examples(encoder, [record.value])
        assert joined.batch.item_key is not None
        columns = (joined.request.tolist(), joined.batch.item_key.tolist(), joined.kind.tolist())
        rows = list(zip(*columns, strict=True))
        found.update(rows)
        partitions |= {(row, record.partition) for row in rows}
    assert len(partitions) == len(found), "copies lie beside the first"
    return set(found), sum(found.values()) - len(found)
