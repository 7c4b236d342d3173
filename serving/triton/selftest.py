"""Requests that were scored in process when a model was exported, kept beside it: what Triton must answer the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engine.errors import BundleError

FILE = "selftest.safetensors"
TOLERANCE = 1e-5
_INPUT, _EXPECTED, _VERSION, _TOLERANCE = "input", "expected", "version", "tolerance"

_PATIENCE, _PAUSE = 0.5, 0.02
"""Seconds that scores may differ from those of the version that they are said to be of, and between two looks."""

Infer = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """inputs: 1-d tensors by name; expected: task -> FP32 [N] of the in-process scorer."""

    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SelfTest:
    """inputs, expected: a small request that can be asked every second; version: the bundle's; more: others.

    tolerance: largest difference of a score.
    """

    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]
    version: str
    more: tuple[Case, ...] = ()
    tolerance: float = TOLERANCE

    @property
    def cases(self) -> tuple[Case, ...]:
        return (Case(self.inputs, self.expected), *self.more)

    @classmethod
    def open(cls, folder: Path) -> SelfTest:
        """Of a version's folder. FileNotFoundError where it has none; BundleError where it is damaged."""
        path = folder / FILE
        try:
            with safe_open(path, "np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = file.metadata() or {}
                tolerance = float(said.get(_TOLERANCE, TOLERANCE))
        except (SafetensorError, ValueError) as error:
            raise BundleError(f"{path}: damaged ({error}); export the model again") from error
        cases: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            number, _, name = name.partition(".")
            if kind in (_INPUT, _EXPECTED):
                cases.setdefault(number, ({}, {}))[kind == _EXPECTED][name] = tensor
        whole = [Case(*cases[number]) for number in sorted(cases, key=lambda n: (len(n), n))]
        if not whole or not all(case.inputs and case.expected for case in whole):
            raise BundleError(f"{path}: no tensors '{_INPUT}...' and '{_EXPECTED}...'; export the model again")
        return cls(whole[0].inputs, whole[0].expected, said.get(_VERSION, ""), tuple(whole[1:]), tolerance)

    def write(self, folder: Path) -> None:
        """Into a version's folder: `input.0.NAME`, `expected.0.TASK`, and so on for each request."""
        tensors: dict[str, np.ndarray] = {}
        for number, case in enumerate(self.cases):
            tensors |= {f"{_INPUT}.{number}.{n}": np.ascontiguousarray(t) for n, t in case.inputs.items()}
            expected = {n: np.ascontiguousarray(t, dtype=np.float32) for n, t in case.expected.items()}
            tensors |= {f"{_EXPECTED}.{number}.{n}": t for n, t in expected.items()}
        save_file(tensors, folder / FILE, {_VERSION: self.version, _TOLERANCE: str(self.tolerance)})
        (folder / FILE).chmod(0o644)  # safetensors lets only its owner read what it writes

    def run(self, infer: Infer) -> str:
        """Asks the small request -> the version that answered.

        BundleError names the task that is wrong; infer's own errors pass. Scores are compared while the bundle's own
        version answers. Once deltas were applied (`version+epoch.sequence`) they are others, and must be probabilities,
        one a candidate.
        """
        return self._asked(self.cases[0], infer)

    def run_all(self, infer: Infer) -> str:
        """Asks all requests, as `run` does."""
        return [self._asked(case, infer) for case in self.cases][-1]

    def _asked(self, case: Case, infer: Infer) -> str:
        until = time.monotonic() + _PATIENCE
        while True:
            answered, wrong = self._checked(case, infer(dict(case.inputs)))
            if not wrong:
                return answered
            if time.monotonic() > until:
                raise BundleError(f"self-test: {wrong}")
            time.sleep(_PAUSE)  # a first delta's rows are in before the version says so

    def _checked(self, case: Case, answer: Mapping[str, np.ndarray]) -> tuple[str, str]:
        """-> (the version that answered, by what its scores differ). BundleError for an answer that none can give."""
        answered = np.asarray(answer.get(_VERSION, np.zeros(0, np.uint8)), np.uint8).tobytes().decode(errors="replace")
        base, learnt, _ = answered.partition("+")
        if base != self.version:
            raise BundleError(f"self-test: version '{answered}' answers in place of '{self.version}'")
        for task, expected in case.expected.items():
            scores = answer.get(task)
            if scores is None or scores.shape != expected.shape:
                shape = "no scores" if scores is None else f"scores of shape {list(scores.shape)}"
                raise BundleError(f"self-test: {shape} of task '{task}' in place of {list(expected.shape)}")
            if not ((scores >= 0) & (scores <= 1)).all():
                raise BundleError(f"self-test: scores of task '{task}' are not probabilities")
            worst = float(np.abs(scores - expected).max(initial=0.0))
            if not learnt and worst > self.tolerance:
                return answered, f"scores of task '{task}' differ by up to {worst:.3g} from the in-process scorer's"
        return answered, ""
