"""The learner: events in, a trained model out, with counts that add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle, verify
from engine.config import Config
from engine.errors import BundleError, CheckpointError, EventError, LogGap
from engine.hashing import fingerprint
from engine.plugins import Plugins
from engine.streaming.learning.audit import RECORD
from engine.streaming.learning.learner import Learner
from tests.streaming.film_learner import changed, configured
from tests.streaming.film_stream import BEGIN, Stream, click, event, ranking, visits
from tests.streaming.memory_log import MemoryLog


@pytest.fixture(scope="session")
def config(films: Any, tiny_bundle: Path) -> Config:
    return configured(tiny_bundle)


def learner(config: Config, log: MemoryLog, out: Path, plugins: Plugins, bundle: Path, **more: Any) -> Learner:
    return Learner(config, log, out, plugins=plugins, bundle=bundle, **more)


def run(config: Config, log: MemoryLog, out: Path, plugins: Plugins, bundle: Path, **more: Any) -> dict[str, Any]:
    learning = learner(config, log, out, plugins, bundle, **more)
    try:
        return learning.run("end")
    finally:
        learning.close()


def adds_up(summary: dict[str, Any]) -> None:
    """Every event is one of the outcomes, every example is trained or waits, every impression has one fate."""
    events, examples, join = summary["events"], summary["examples"], summary["join"]
    assert events["in"] == sum(n for name, n in events.items() if name != "in")
    assert examples["joined"] == examples["trained"] + examples["waiting"]
    assert examples["trained"] == examples["positive"] + examples["negative"] + examples["correction"]
    fates = sum(join[f"liked.{what}"] for what in ("positives", "negatives", "thinned"))
    assert join["impressions"] == fates + summary["open"]["liked"]


def test_a_drained_log_is_joined_and_trained_and_leaves_a_bundle(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """300 rankings a second apart: at the end the watermark is 5 s behind the newest event, and windows last 20 s, so
    the films of rankings up to then that nobody clicked are negatives, and every click in the log is a positive."""
    stream = visits(300)
    log = MemoryLog(partitions=2)
    stream.write(log)
    audit = tmp_path / "audit"
    summary = run(config, log, tmp_path / "out", plugins, tiny_bundle, audit=audit)
    adds_up(summary)
    assert summary["events"]["rankings"] == 300
    assert summary["events"]["interactions"] == len(stream.liked)
    assert summary["join"]["liked.positives"] == len(stream.liked)
    assert summary["steps"] == summary["examples"]["joined"] // 32
    assert summary["examples"]["waiting"] == summary["examples"]["joined"] % 32
    trained = np.fromfile(audit, RECORD)
    assert len(trained) == summary["examples"]["trained"]
    pairs = list(zip(trained["request"].tolist(), trained["item"].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "each impression once"
    liked = {(fingerprint(r), fingerprint(i)) for r, i in stream.liked}
    assert {p for p, kind in zip(pairs, trained["kind"], strict=True) if kind == 0} <= liked
    assert not liked & {p for p, kind in zip(pairs, trained["kind"], strict=True) if kind == 1}
    bundle = Bundle.open(tmp_path / "out" / "bundle")
    assert verify(bundle.path, plugins).ok
    assert bundle.manifest.parent == Bundle.open(tiny_bundle).version
    assert bundle.manifest.metrics["learning"]["positions"] == {str(p): e for p, e in log.ends().items()}
    assert (tmp_path / "out" / "learning.html").exists()
    json.dumps(summary, allow_nan=False)


def test_what_moved_is_learnt(config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path) -> None:
    """Users now like another genre than the bundle was trained on: on the same rows the learner ranks better."""
    log = MemoryLog()
    visits(1500, taste=1).write(log)
    summary = run(changed(config, embedding_lr=0.2, dense_lr=0.01), log, tmp_path, plugins, tiny_bundle)
    figures = summary["figures"]["tasks"]["liked"]
    assert figures["base"]["auc"] < 0.55, "nothing of what the bundle knows holds any more"
    assert figures["auc"] > figures["base"]["auc"] + 0.1


def test_stopping_and_going_on_anywhere_gives_the_same_bits(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Stopped after every few chunks, with two partitions, item events, copies and poison in the log."""
    stream = _mixed()
    log = MemoryLog(partitions=2)
    stream.write(log)
    whole = run(config, log, tmp_path / "whole", plugins, tiny_bundle, audit=tmp_path / "whole.audit")
    adds_up(whole)
    broken = changed(config, checkpoint_events=170)
    for stops in range(100):
        learning = learner(broken, log, tmp_path / "broken", plugins, tiny_bundle, audit=tmp_path / "broken.audit")
        learning._finish = lambda drained: None  # type: ignore[method-assign]  nothing after the last checkpoint stays
        left = 1 + stops % 4
        take = learning._take

        def counting(chunk: Any, live: bool, *, take: Any = take, learning: Learner = learning) -> None:
            nonlocal left
            take(chunk, live)
            left -= 1
            if left <= 0:
                learning.stop()

        learning._take = counting  # type: ignore[method-assign]
        learning.run("end")
        learning.close()
        if learning.positions == log.ends() and left > 0:
            break
    last = run(broken, log, tmp_path / "broken", plugins, tiny_bundle, audit=tmp_path / "broken.audit")
    assert stops > 5
    for name in ("events", "join", "examples", "open", "steps", "positions", "figures"):
        assert last[name] == whole[name], name
    assert (tmp_path / "whole.audit").read_bytes() == (tmp_path / "broken.audit").read_bytes()
    one, two = (Bundle.open(tmp_path / n / "bundle").manifest.files for n in ("whole", "broken"))
    for file in ("model.safetensors", "optimizer.safetensors", "retrieval.safetensors", "catalogue/items.arrow"):
        assert one[file] == two[file], file


def _mixed() -> Stream:
    stream = visits(200)
    copies = [stream.events[n] for n in range(0, len(stream.events), 7)]
    for place, copy in enumerate(copies):
        stream.events.insert(min(len(stream.events), 9 * place + 20), copy)
    stream.events.insert(30, ("nobody", b"{not json"))
    stream.events.insert(60, ("u1", b'{"id": "x", "source": "films", "type": "interaction", "data": {}}'))
    item = event("item", "film-new", BEGIN + 50, {"item": "new", "features": {"genres": "war|all", "year": 2001}})
    stream.events.insert(90, ("\x00item\x00new", item))
    stream.events.append(("u1", ranking("r-new", "u1", ["new", "unheard-of", "3"], BEGIN + 201)))
    stream.events.append(("u1", click("c-new", "u1", "new", "r-new", BEGIN + 202)))
    stream.events.append(("u1", click("c-foreign", "u1", "29", "r-new", BEGIN + 203)))
    return stream


def test_poison_is_kept_and_counted_and_the_rest_is_trained(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    stream = _mixed()
    log = MemoryLog()
    stream.write(log)
    summary = run(config, log, tmp_path, plugins, tiny_bundle)
    adds_up(summary)
    letters = [json.loads(r.value) for r in log.sibling("dead").records]
    assert sorted(letter["reason"] for letter in letters) == ["json", "schema", "unknown_item"]
    assert summary["events"]["dead"] == 3
    assert summary["events"]["items"] == 1
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.catalogue.rows(["new"])[0] == 30, "behind the thirty of the bundle"
    assert verify(bundle.path, plugins).ok


def test_a_stream_of_poison_stops_the_learner(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    log.append([("u1", b"{")] * 1100)
    with pytest.raises(EventError, match=r"of the newest 1,0\d\d events are dead letters.*plexrank events dead list"):
        run(config, log, tmp_path, plugins, tiny_bundle)


def test_a_second_learner_of_a_partition_is_refused(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog(partitions=2)
    locks = tmp_path / "locks"
    one = learner(config, log, tmp_path / "one", plugins, tiny_bundle, partitions=[0], locks=locks)
    with pytest.raises(EventError, match=r"partition 0 is learnt from by process \d+ already"):
        learner(config, log, tmp_path / "two", plugins, tiny_bundle, locks=locks)
    other = learner(config, log, tmp_path / "two", plugins, tiny_bundle, partitions=[1], locks=locks)
    one.close()
    other.close()
    learner(config, log, tmp_path / "three", plugins, tiny_bundle, locks=locks).close()


def test_a_checkpoint_of_another_log_or_bundle_is_refused_with_the_choices(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log, other = MemoryLog(), MemoryLog()
    for one in (log, other):
        visits(60).write(one)
    out = tmp_path / "out"
    run(config, log, out, plugins, tiny_bundle)
    with pytest.raises(CheckpointError, match=r"another log.*--from.*'earliest'"):
        run(config, other, out, plugins, tiny_bundle)
    with pytest.raises(CheckpointError, match=r"is the model now.*--from"):
        run(config, log, out, plugins, out / "bundle")
    again = run(config, other, out, plugins, tiny_bundle, start="earliest")
    assert again["events"]["rankings"] == 60
    newest = run(config, other, tmp_path / "b", plugins, tiny_bundle, start="latest")
    assert newest["events"]["in"] == 0
    with pytest.raises(BundleError, match="says no positions of this log"):
        run(config, other, tmp_path / "c", plugins, tiny_bundle, start="bundle")


def test_a_bundle_that_was_learnt_says_where_to_go_on(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(60).write(log)
    run(config, log, tmp_path / "one", plugins, tiny_bundle)
    visits(40, seed=6).write(log)
    summary = run(config, log, tmp_path / "two", plugins, tmp_path / "one" / "bundle")
    assert summary["events"]["rankings"] == 40


def test_records_that_are_gone_are_said_with_the_choices(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(60).write(log)
    run(config, log, tmp_path, plugins, tiny_bundle)
    end = log.ends()[0]
    visits(60, seed=6).write(log)
    log.trim(0, end + 10)
    with pytest.raises(LogGap, match=rf"position {end} is not in.*--from"):
        run(config, log, tmp_path, plugins, tiny_bundle)
    assert run(config, log, tmp_path, plugins, tiny_bundle, start="earliest")["events"]["in"] > 0
