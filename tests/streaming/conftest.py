"""Fixtures of several files here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.streaming.deltas.publisher import DeltaPublisher
from tests.streaming.chain_world import A, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A registry without a version, and its streams."""
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def publisher(world: World) -> DeltaPublisher:
    """Bundle A is current, its chain has epoch 1."""
    made = world.publisher()
    made.publish_bundle(world.bundles[A], 1, "first")
    return made
