"""From where to where a log is learnt: words, offsets, times; the learner does exactly that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import typer

from engine.commands.learning import learn
from engine.config import Config
from engine.errors import CheckpointError, EventError
from engine.plugins import Plugins
from engine.streaming.learning.learner import Learner
from engine.streaming.learning.span import Moment, Places, Start, Until, ends_of, located, start_of, until_of
from tests.streaming.film_learner import configured
from tests.streaming.film_stream import BEGIN, visits
from tests.streaming.memory_log import MemoryLog


@pytest.fixture(scope="module")
def config(tiny_bundle: Path) -> Config:
    return configured(tiny_bundle)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("earliest", "earliest"),
        ("latest", "latest"),
        ("bundle", "bundle"),
        ("checkpoint", "checkpoint"),
        ("0:1200", Places(("0:1200",))),
        ("0:1200,11:900", Places(("0:1200", "11:900"))),
        ("2026-01-31T12:00:00Z", Moment(1769860800.0)),
        ("2026-01-31T12:00", Moment(1769860800.0)),
        ("1769860800500", Moment(1769860800.5)),
    ],
)
def test_a_start_is_a_word_offsets_or_a_time(text: str, start: Start) -> None:
    assert start_of(text) == start


@pytest.mark.parametrize("text", ["", "live", "1200", "0:", "0:1,", "yesterday", "2026-13-01"])
def test_what_is_none_of_these_is_said_with_what_there_is(text: str) -> None:
    with pytest.raises(EventError, match=r"none of earliest.*0:1200,1:900.*2026-01-31T12:00:00Z"):
        start_of(text)


def test_an_end_is_live_end_offsets_or_a_time_that_has_passed() -> None:
    assert [until_of(text) for text in ("live", "end", "0:7")] == ["live", "end", Places(("0:7",))]
    assert until_of("2026-01-31T12:00:00Z") == Moment(1769860800.0)
    with pytest.raises(EventError, match="still to come"):
        until_of("2999-01-01")


def test_offsets_have_to_be_in_the_log_and_name_every_partition() -> None:
    log = MemoryLog(partitions=2)
    visits(40).write(log)
    ends = log.ends()
    assert located(log, Places(("1:3", "0:5")), [0, 1]) == {0: 5, 1: 3}
    assert located(log, Places(("1:3", "0:5")), [1]) == {1: 3}
    with pytest.raises(EventError, match="says no offset of partition 1"):
        located(log, Places(("0:5",)), [0, 1])
    with pytest.raises(EventError, match=f"1:{ends[1] + 1} is not in the log: it holds 0 up to {ends[1]}"):
        located(log, Places(("0:5", f"1:{ends[1] + 1}")), [0, 1])


def test_an_end_never_lies_before_where_a_partition_stands() -> None:
    log = MemoryLog()
    visits(40).write(log)
    assert ends_of(log, Places(("0:5",)), {0: 20}) == {0: 20}
    assert ends_of(log, "end", {0: 20}) == log.ends()
    assert ends_of(log, "live", {0: 20}) is None


def run(
    config: Config, log: MemoryLog, out: Path, plugins: Plugins, bundle: Path, until: Until = "end", **how: Any
) -> dict[str, Any]:
    learner = Learner(config, log, out, plugins=plugins, bundle=bundle, **how)
    try:
        return learner.run(until)
    finally:
        learner.close()


def test_a_part_of_a_log_is_learnt_and_then_the_rest_as_if_there_had_been_no_stop(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """One partition, stopped at the end of a chunk: the same examples in the same order, so the same digest."""
    log = MemoryLog()
    visits(120).write(log)
    chunk, end = config.learning.chunk, log.ends()[0]
    part = run(config, log, tmp_path / "two", plugins, tiny_bundle, Places((f"0:{2 * chunk}",)), start="earliest")
    assert part["positions"] == {"0": 2 * chunk}
    assert part["events"]["in"] == 2 * chunk
    rest = run(config, log, tmp_path / "two", plugins, tiny_bundle, start="checkpoint")
    whole = run(config, log, tmp_path / "one", plugins, tiny_bundle)
    assert rest["positions"] == whole["positions"] == {"0": end}
    for name in ("events", "examples", "examples_sha256"):
        assert rest[name] == whole[name], name
    again = run(config, log, tmp_path / "two", plugins, tiny_bundle, Places(("0:10",)))
    assert again["positions"] == {"0": end}, "nothing is read backwards"


def test_it_begins_at_offsets_and_at_a_time_of_the_log(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(40).write(log)
    first = log.ends()[0]
    time.sleep(0.02)
    between = time.time()
    time.sleep(0.02)
    visits(30, seed=6, begin=BEGIN + 50).write(log)
    end = log.ends()[0]
    late = run(config, log, tmp_path / "late", plugins, tiny_bundle, start=Moment(between))
    assert late["events"]["in"] == end - first
    early = run(config, log, tmp_path / "early", plugins, tiny_bundle, Moment(between), start=Places(("0:7",)))
    assert early["positions"] == {"0": first}
    assert early["events"]["in"] == first - 7


def test_a_checkpoint_that_is_wanted_has_to_be_there(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint to go on from; choose with --from"):
        Learner(config, MemoryLog(), tmp_path, plugins=plugins, bundle=tiny_bundle, start="checkpoint")


@pytest.mark.parametrize(("option", "how"), [("--from", {"begin": "noon"}), ("--until", {"until": "noon"})])
def test_what_the_command_cannot_read_is_wrong_usage(option: str, how: dict[str, str], tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "configs" / "movielens-100k.yaml"
    with pytest.raises(typer.BadParameter, match="'noon' is none of") as raised:
        learn(file, bundle=tmp_path, **how)  # type: ignore[arg-type]
    assert raised.value.param_hint == option
