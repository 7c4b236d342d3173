"""Joined examples on their way from one learner to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.bundle import Bundle
from engine.config import Config
from engine.errors import SchemaError
from engine.plugins import Plugins
from engine.streaming.learning.learner import Learner
from tests.streaming.film_learner import changed, configured
from tests.streaming.film_stream import visits
from tests.streaming.memory_log import MemoryLog


@pytest.fixture(scope="session")
def config(tiny_bundle: Path) -> Config:
    return configured(tiny_bundle, retrieval=False)


def run(config: Config, log: MemoryLog, out: Path, plugins: Plugins, bundle: Path, **learning: Any) -> dict[str, Any]:
    learner = Learner(changed(config, **learning), log, out, plugins=plugins, bundle=bundle)
    try:
        return learner.run("end")
    finally:
        learner.close()


def test_a_learner_of_examples_ends_with_the_bits_of_the_one_that_joined_them(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(300).write(log)
    joined = run(config, log, tmp_path / "joined", plugins, tiny_bundle, write_examples=True)
    read = run(config, log, tmp_path / "read", plugins, tiny_bundle, source="examples")
    assert read["steps"] == joined["steps"] > 10
    assert read["events"] == {"in": joined["examples"]["trained"], "examples": read["steps"] * 32} | {
        "duplicates": 0,
        "dead": 0,
    }
    one, two = (Bundle.open(tmp_path / name / "bundle").manifest.files for name in ("joined", "read"))
    assert one["model.safetensors"] == two["model.safetensors"]
    assert one["optimizer.safetensors"] == two["optimizer.safetensors"]


def test_examples_that_were_written_twice_are_trained_once(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(200).write(log)
    joined = run(config, log, tmp_path / "joined", plugins, tiny_bundle, write_examples=True)
    examples = log.sibling("examples")
    again = [(record.key, record.value) for record in examples.records[3:7]]
    examples.append(again)
    read = run(config, log, tmp_path / "read", plugins, tiny_bundle, source="examples")
    assert read["examples"]["trained"] == joined["examples"]["trained"]
    assert read["events"]["duplicates"] == 4 * 32
    one, two = (Bundle.open(tmp_path / name / "bundle").manifest.files for name in ("joined", "read"))
    assert one["model.safetensors"] == two["model.safetensors"]


def test_a_damaged_message_is_a_dead_letter_and_the_others_are_trained(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(200).write(log)
    joined = run(config, log, tmp_path / "joined", plugins, tiny_bundle, write_examples=True)
    examples = log.sibling("examples")
    examples.overwrite(0, 2, b"\xff\xff\xff\xffnothing of the kind")
    read = run(config, log, tmp_path / "read", plugins, tiny_bundle, source="examples")
    assert read["events"]["dead"] == 1
    assert read["examples"]["joined"] == joined["examples"]["trained"] - 32


def test_examples_of_another_model_are_refused(
    films: Any, config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    from engine.train_command import run_training

    log = MemoryLog()
    visits(200).write(log)
    run(config, log, tmp_path / "joined", plugins, tiny_bundle, write_examples=True)
    other = films.config(features=[{"name": "user_id", "side": "user"}, {"name": "item_id"}], interest=None)
    run_training(other, tmp_path / "other", plugins=plugins)
    with pytest.raises(SchemaError, match="the examples are of another model"):
        run(other, log, tmp_path / "read", plugins, tmp_path / "other" / "bundle", source="examples")
