"""Joined examples to stream `examples`, for other learners."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from engine.batch import Batch
from engine.components import EventLog
from engine.data.encoder import FeatureEncoder
from engine.errors import LogUnavailable
from engine.streaming.join.examples import JoinedExamples, encode_examples
from engine.streaming.join.ready import Examples

log = logging.getLogger("plexrank.learning")

_PATIENCE = 0.5


class ExamplesWritten:
    """Durable before they count as trained; again after a crash."""

    def __init__(
        self,
        target: EventLog,
        encoder: FeatureEncoder,
        tasks: Sequence[str],
        key_of: Callable[[Examples], str],
        wait: Callable[[float], bool],
    ) -> None:
        """key_of: the records' key. wait: for some seconds -> whether to give up."""
        self._target, self._encoder, self._tasks = target, encoder, tuple(tasks)
        self._key_of, self._wait = key_of, wait

    def __call__(self, batch: Batch, examples: Examples) -> None:
        """A batch of features with what was joined to it. LogUnavailable only where it is to give up."""
        labels = {t: torch.from_numpy(examples.labels[:, j].copy()) for j, t in enumerate(self._tasks)}
        whole = replace(batch, labels=labels, weight=torch.from_numpy(examples.weight))
        joined = JoinedExamples(whole, examples.rate, examples.seconds, examples.kind, examples.request)
        key = self._key_of(examples)
        messages = [(key, message) for message in encode_examples(self._encoder, joined)]
        while True:
            try:
                self._target.append(messages)
                return
            except LogUnavailable as error:
                log.warning("examples wait: %s", error)
                if self._wait(_PATIENCE):
                    raise
