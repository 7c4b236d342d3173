"""A model in Triton, as one who follows a learner sees it: a scorer that loads bundles and takes deltas."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.bundle import Bundle, read_manifest
from engine.config_triton import TritonConfig
from engine.errors import BundleError, PlexrankError
from engine.inference.live_writer import LiveWriter
from engine.plugins import Plugins
from engine.streaming.deltas.delta import Delta, parsed
from serving.triton.client import TritonClient
from serving.triton.config_pbtxt import ModelConfig
from serving.triton.deploy import deploy
from serving.triton.export import Wish, held_by
from serving.triton.layout import BUNDLE, CONFIG, live_root, version_numbers
from serving.triton.variant import Variant

log = logging.getLogger("plexrank.triton")

_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0
"""Seconds until a bundle that Triton refused is tried again: at first, and at most; each time doubles them."""


class TritonTarget:
    """`load` deploys, `apply` writes what all instances of the newest version score from.

    One thread changes it; `version` and `number` may be read by others.
    """

    def __init__(
        self,
        repository: Path,
        model: str,
        client: TritonClient,
        plugins: Plugins,
        given: Mapping[str, Any] | None = None,
        stated: TritonConfig | None = None,
    ) -> None:
        """Goes on with the newest version of the repository, and the deltas that it has. given, stated: as `Wish`.

        PlexrankError naming the process that writes there already.
        """
        self.repository, self.model = repository, model
        self._client, self._plugins, self._given, self._stated = client, plugins, given, stated
        self._writer: LiveWriter | None = None
        self._refused: tuple[Path, BundleError, float, float] | None = None
        self.number: int | None = None
        newest = version_numbers(repository / model)[-1:]
        try:
            if newest:
                self._write_to(newest[0])
        except BundleError as error:
            log.warning("%s: version %d is not gone on with: %s", model, newest[0], error)

    @property
    def version(self) -> str:
        """What the newest version scores with; PlexrankError where there is none."""
        return self._now().version

    def load(self, bundle: Path) -> None:
        """Deployed, and without deltas: where the newest version holds the bundle, its memory begins anew.

        Raises as `deploy`; a bundle that was refused is not tried again at once.
        """
        pause = self._pause_for(bundle)
        name = None if read_manifest(bundle).name == self.model else self.model
        wish = Wish(bundle, name, self._given, self._stated)
        try:
            done = deploy(wish, self.repository, self._client, self._plugins).exported
        except BundleError as error:
            self._refused = (bundle, error, time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE))
            raise
        self._refused = None
        if self.number != done.number or self._writer is None:
            self._write_to(done.number)
        if parsed(self.version)[2] > 0:
            self._now().begin_anew()

    def apply(self, delta: Delta) -> None:
        """As `Scorer.apply`, to the newest version that has the bundle: somebody may have deployed it once more, with
        other settings, or removed its memory. As that one has no deltas then, DeltaGap brings them all."""
        base = parsed(self.version)[0]
        newest = version_numbers(self.repository / self.model)[-1:]
        if newest and newest[0] != self.number and held_by(self.repository / self.model / str(newest[0])) == base:
            self._write_to(newest[0])
        elif self.number is not None and not self._now().in_place:
            log.warning("%s: the live memory of version %d was removed: it begins anew", self.model, self.number)
            self._write_to(self.number)
        self._now().apply(delta)

    def beat(self) -> None:
        """Says in the live memory that its writer is alive."""
        if self._writer is not None:
            self._writer.beat()

    def close(self) -> None:
        """Another process may write from now on."""
        if self._writer is not None:
            self._writer.close()

    def _now(self) -> LiveWriter:
        if self._writer is None:
            raise PlexrankError(f"{self.repository}: no version of {self.model} is served yet")
        return self._writer

    def _pause_for(self, bundle: Path) -> float:
        """Seconds to wait if the bundle is refused again; its last error where it is too early to try."""
        if self._refused is None or self._refused[0] != bundle:
            return _FIRST_PAUSE
        _, error, again, pause = self._refused
        if time.monotonic() < again:
            raise error
        return pause

    def _write_to(self, number: int) -> None:
        folder = self.repository / self.model
        settings = ModelConfig.read(folder / CONFIG).settings
        bundle = Bundle.open(folder / str(number) / BUNDLE, verify=False)
        tables = Variant.read(folder / str(number)).tables
        live = live_root(self.repository, settings.live) / self.model / str(number)
        writer = LiveWriter(live, bundle, self._plugins, item_vectors_mb=settings.item_vectors_mb, tables=tables)
        before, self._writer, self.number = self._writer, writer, number
        if before is not None:
            before.close()
