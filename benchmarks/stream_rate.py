"""How many events a second one core consumes, decodes, joins and trains, and where the time goes.

    python -m benchmarks.stream_rate [--quick] [--rows 200000]

Events of the synthetic service (rankings of ten items with features and history, and clicks) lie in a topic of a real
Kafka-protocol broker, one a record, as JSON. Beside our figures stand those of the client alone: kafka-python that
polls, and kafka-python with orjson. Rates are a second of this process's processor time (its client's included, the
broker's not), so that other work on the machine does not show; wall time stands beside. Of five rounds over the raw
events the middle one of each kind counts: the client's own cost varies by more than half.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.lines import Report, arguments, one_thread

one_thread()

import orjson  # noqa: E402
import torch  # noqa: E402

from benchmarks.broker import broker, kafka  # noqa: E402
from benchmarks.runs import CONFIGS  # noqa: E402
from benchmarks.stream_events import events, write  # noqa: E402
from engine.bundle import Bundle  # noqa: E402
from engine.components import EventLog, LogRecord  # noqa: E402
from engine.config import Config  # noqa: E402
from engine.loading import load_config  # noqa: E402
from engine.plugins import Plugins, installed  # noqa: E402
from engine.streaming.events.dead import DeadLetters  # noqa: E402
from engine.streaming.events.decode import decode_records  # noqa: E402
from engine.streaming.join.examples import decode_examples, encode_examples, joined_examples  # noqa: E402
from engine.streaming.learning.fetch import Chunk  # noqa: E402
from engine.streaming.learning.joining import EventsJoined  # noqa: E402
from engine.streaming.learning.learner import Learner  # noqa: E402
from engine.train_command import run_training  # noqa: E402

CHUNK, ROUNDS = 500, 5


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(
        __doc__ or "", argv, extra={"--rows": {"type": int, "default": 200_000, "help": "of the synthetic service"}}
    )
    report = Report("stream_rate", quick=options.quick)
    torch.set_num_threads(1)
    rows = 20_000 if options.quick else options.rows
    plugins = installed()
    with tempfile.TemporaryDirectory() as scratch, broker() as address:
        folder = Path(scratch)
        config = _config(rows, plugins)
        report.tell("training a bundle")
        bundle = Bundle.open(Path(run_training(config, folder / "run", plugins=plugins)["bundle"]))
        log = kafka(plugins, address, topic="bench.events", partitions=1)
        report.tell("writing events")
        count = write(log, events(config, plugins, folder / "cache", after=0.2))
        report.tell(f"{count:,} events")
        _through(log, count, lambda records: None)  # the broker's and the client's first time
        times: dict[str, list[tuple[float, float]]] = {}
        for number in range(ROUNDS):
            report.tell(f"round {number + 1} of {ROUNDS}")
            stream = EventsJoined(config, bundle, DeadLetters(log), stopped=lambda: False)
            for name, work in _passes(stream).items():
                times.setdefault(name, []).append(_through(log, count, work))
        spent = {name: sorted(its)[ROUNDS // 2] for name, its in times.items()}
        _tell_events(report, count, spent, dict(stream.counts))
        messages: list[bytes] = []
        again = EventsJoined(config, bundle, DeadLetters(log), stopped=lambda: False)
        _through(log, count, lambda records: _join(again, records, messages))
        _examples(report, log, bundle, messages)
        _learn(report, config, bundle, log, folder, plugins)
        log.close()
    return report.end()


def _passes(stream: EventsJoined) -> dict[str, Callable[[list[LogRecord]], object]]:
    """What is done with the records of a poll: more and more of it."""
    return {
        "polled": lambda records: None,
        "polled, orjson": lambda records: [orjson.loads(record.value) for record in records],
        "polled, decoded": lambda records: decode_records(records, stream.limits, time.time(), 300.0),
        "polled, decoded, joined": lambda records: _join(stream, records, None),
    }


def _through(log: EventLog, count: int, work: Callable[[list[LogRecord]], object]) -> tuple[float, float]:
    """The whole topic, a chunk at a time -> (processor, wall) seconds."""
    reader = log.reader(log.begins())
    wall, cpu = time.perf_counter(), time.process_time()
    left = count
    while left:
        records = reader.poll(CHUNK, 1.0)
        work(records)
        left -= len(records)
    spent = time.process_time() - cpu, time.perf_counter() - wall
    reader.close()
    return spent


def _join(stream: EventsJoined, records: list[LogRecord], messages: list[bytes] | None) -> None:
    """As the learner does it, with the examples' features where `messages` takes them."""
    if not records:
        return
    stream.take(Chunk(0, records, records[-1].offset + 1), 0.0)
    examples = stream.ready.pop(len(stream.ready))
    if messages is not None and len(examples):
        batch = stream.pending.take(examples.slot)
        messages += encode_examples(stream.encoder, joined_examples(batch, examples, stream.tasks))
    stream.pending.release(stream.ready.free())


def _tell_events(report: Report, count: int, spent: dict[str, tuple[float, float]], counts: dict[str, int]) -> None:
    rates = {name: count / cpu for name, (cpu, _) in spent.items()}
    ours = rates["polled, decoded, joined"]
    report.line(
        "raw events joined a processor second",
        ours=ours,
        peer=rates["polled, orjson"],
        ratio=ours / rates["polled, orjson"],
        target=">= 20,000",
        ok=ours >= 20_000,
        client_alone=rates["polled"],
        microseconds_an_event={
            "client": 1e6 / rates["polled"],
            "decoding": 1e6 / rates["polled, decoded"] - 1e6 / rates["polled"],
            "joining": 1e6 / ours - 1e6 / rates["polled, decoded"],
        },
        wall={name: count / wall for name, (_, wall) in spent.items()},
        examples_an_event=counts["examples"] / count,
        counts=counts,
    )


def _examples(report: Report, log: EventLog, bundle: Bundle, messages: list[bytes]) -> None:
    """Joined examples, as another learner reads them."""
    report.tell("joined examples")
    joined = log.sibling("examples", partitions=1)
    for message in messages:
        joined.append([("bench", message)])
    found = [0]

    def decode(records: list[LogRecord]) -> None:
        if records:
            found[0] += len(decode_examples(bundle.encoder, [record.value for record in records]))

    cpu, wall = _through(joined, len(messages), decode)
    client, _ = _through(joined, len(messages), lambda records: None)
    joined.close()
    report.line(
        "joined examples read as Arrow a processor second",
        ours=found[0] / cpu,
        peer=found[0] / client,
        ratio=client / cpu,
        target=">= 100,000",
        ok=found[0] / cpu >= 100_000,
        wall=found[0] / wall,
        examples=found[0],
        bytes_an_example=sum(map(len, messages)) / found[0],
    )


def _learn(report: Report, config: Config, bundle: Bundle, log: EventLog, folder: Path, plugins: Plugins) -> None:
    """The whole learner: consumed, joined, judged, trained."""
    report.tell("learning")
    learner = Learner(config, log, folder / "learner", plugins=plugins, bundle=bundle.path)
    cpu = time.process_time()
    try:
        summary = learner.run("end")
    finally:
        learner.close()
    cpu = time.process_time() - cpu
    report.line(
        "raw events learned from a processor second",
        ours=summary["events"]["in"] / cpu,
        peer=None,
        ratio=None,
        examples_a_second=summary["examples"]["trained"] / cpu,
        seconds=summary["seconds"],
        events=summary["events"],
        examples=summary["examples"],
    )


def _config(rows: int, plugins: Plugins) -> Config:
    """Time is the events' own: windows of half an hour, all of them in order."""
    overrides = {"data.dataset.options.impressions": rows, "training.epochs": 1, "training.threads": 1}
    overrides |= {"data.split.validation": 0.05, "data.split.test": 0.75}
    return load_config(CONFIGS / "synthetic.yaml", overrides, plugins)


if __name__ == "__main__":
    sys.exit(main())
