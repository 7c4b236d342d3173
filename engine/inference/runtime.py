"""Scores requests that come as tensors; one that does not fit fails alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from engine.errors import PlexrankError, RequestError
from engine.inference.signature import CANDIDATES, LENGTHS, VERSION, Signature
from engine.inference.tensors import MOST_ITEMS, checked
from engine.inference.together import Asked, Scoring, from_ids, from_vectors
from engine.schema import FeatureSpec, Schema

Tensors = Mapping[str, np.ndarray | Tensor]
Answer = dict[str, np.ndarray] | PlexrankError
LogitsOf = Callable[[Sequence[Asked]], Mapping[str, Tensor]]


class Runtime:
    """Requests as `Signature` describes, to calibrated probabilities. Safe from many threads.

    Requests whose items the catalogue knows, and that bring no features of items, are scored together from the items'
    vectors; the others together from their ids.
    """

    def __init__(self, now: Callable[[], Scoring], *, most_items: int = MOST_ITEMS) -> None:
        """now: asked once a call. most_items: candidates of one request."""
        self._now, self._most_items = now, most_items
        self._signed: tuple[Schema, Signature] | None = None

    @property
    def signature(self) -> Signature:
        """Of what scores now."""
        return self._signature_of(self._now().encoder.schema)

    def infer(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """One request. RequestError where it does not fit, PlexrankError where it cannot be scored."""
        (answer,) = self.score([tensors])
        if isinstance(answer, PlexrankError):
            raise answer
        return answer

    def score(self, requests: Sequence[Tensors]) -> list[Answer]:
        """name -> array of one dimension gives task -> float32 [N] and `version`, or why this request has no answer.

        Arrays that are given must not change meanwhile; those in the answer are the caller's.
        """
        now = self._now()
        asked, answers = self._asked(now, requests)
        whole = asked
        if now.items is not None:
            quick = [a for a in asked if _answered_by_catalogue(now, a)]
            places = {a.place for a in quick}
            whole = [a for a in asked if a.place not in places]
            answers.update(_scores(now, quick, partial(from_vectors, now.items)))
        answers.update(_scores(now, whole, partial(from_ids, now)))
        version = np.frombuffer(now.version.encode(), np.uint8)
        return [_with_version(answers[place], version) for place in range(len(requests))]

    def _asked(self, now: Scoring, requests: Sequence[Tensors]) -> tuple[list[Asked], dict[int, Answer]]:
        """Those to be scored, and the answers of the others by their place."""
        signature = self._signature_of(now.encoder.schema)
        good: list[Asked] = []
        answers: dict[int, Answer] = {}
        for place, tensors in enumerate(requests):
            try:
                fit = checked(tensors, signature, self._most_items)
                _check_aligned(now.model.sequences, fit)
            except RequestError as error:
                answers[place] = error
                continue
            if len(fit[CANDIDATES]):
                good.append(Asked(place, fit, now.catalogue.rows_of(fit[CANDIDATES])))
            else:
                answers[place] = {task: np.empty(0, np.float32) for task in now.encoder.schema.tasks}
        return good, answers

    def _signature_of(self, schema: Schema) -> Signature:
        signed = self._signed
        if signed is None or signed[0] is not schema:
            signed = self._signed = schema, Signature.of(schema)
        return signed[1]


def _answered_by_catalogue(now: Scoring, asked: Asked) -> bool:
    if (asked.rows < 0).any():
        return False
    return not any(f.name in asked.tensors or f.name + LENGTHS in asked.tensors for f in now.encoder.schema.of_item())


def _check_aligned(sequences: Sequence[FeatureSpec], tensors: Mapping[str, np.ndarray]) -> None:
    """The model reads its sequences as the parts of one history."""
    lengths = {s.name: len(tensors.get(s.name, ())) for s in sequences}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
        raise RequestError(f"sequences must be of one length, they list the same events: {said}")


def _scores(now: Scoring, asked: Sequence[Asked], logits_of: LogitsOf) -> dict[int, Answer]:
    """Their answers by place. Where all together fail, each is scored alone, so that the others do not fail with it."""
    if not asked:
        return {}
    try:
        return _calibrated(now, asked, logits_of(asked))
    except Exception as error:
        if len(asked) == 1:
            failed = PlexrankError(f"the request cannot be scored: {type(error).__name__}: {error}")
            failed.__cause__ = error
            return {asked[0].place: failed}
    found: dict[int, Answer] = {}
    for one in asked:
        found.update(_scores(now, [one], logits_of))
    return found


def _calibrated(now: Scoring, asked: Sequence[Asked], logits: Mapping[str, Tensor]) -> dict[int, Answer]:
    """Each request's part of the probabilities; an error for one that has a score that is no number."""
    ends = np.cumsum([len(a) for a in asked])[:-1]
    parts = {task: np.split(now.calibration[task].apply(its.numpy()), ends) for task, its in logits.items()}
    found: dict[int, Answer] = {}
    for n, one in enumerate(asked):
        answer = {task: values[n] for task, values in parts.items()}
        lost = [task for task, values in answer.items() if not np.isfinite(values).all()]
        found[one.place] = PlexrankError(f"task '{lost[0]}': a score is not finite") if lost else answer
    return found


def _with_version(answer: Answer, version: np.ndarray) -> Answer:
    return answer if isinstance(answer, PlexrankError) else {**answer, VERSION: version.copy()}
