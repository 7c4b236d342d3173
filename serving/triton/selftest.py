"""A request that was scored in process when a model was exported, kept beside it: what Triton must answer the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engine.errors import BundleError

FILE = "selftest.safetensors"
TOLERANCE = 1e-5
_INPUT, _EXPECTED, _VERSION = "input.", "expected.", "version"


@dataclass(frozen=True)
class SelfTest:
    """inputs: 1-d tensors by name; expected: task -> FP32 [N] of the in-process scorer; version: the bundle's."""

    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]
    version: str

    @classmethod
    def open(cls, folder: Path) -> SelfTest:
        """Of a version's folder. FileNotFoundError where it has none; BundleError where it is damaged."""
        path = folder / FILE
        try:
            with safe_open(path, "np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                version = (file.metadata() or {}).get(_VERSION, "")
        except SafetensorError as error:
            raise BundleError(f"{path}: damaged ({error}); export the model again") from error
        inputs = {n.removeprefix(_INPUT): t for n, t in tensors.items() if n.startswith(_INPUT)}
        expected = {n.removeprefix(_EXPECTED): t for n, t in tensors.items() if n.startswith(_EXPECTED)}
        if not inputs or not expected:
            raise BundleError(f"{path}: no tensors '{_INPUT}...' and '{_EXPECTED}...'; export the model again")
        return cls(inputs, expected, version)

    def write(self, folder: Path) -> None:
        """Into a version's folder."""
        tensors = {_INPUT + n: np.ascontiguousarray(t) for n, t in self.inputs.items()}
        tensors |= {_EXPECTED + n: np.ascontiguousarray(t, dtype=np.float32) for n, t in self.expected.items()}
        save_file(tensors, folder / FILE, {_VERSION: self.version})

    def run(self, infer: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> str:
        """Asks once -> the version that answered. BundleError names the task that is wrong; infer's own errors pass.

        Scores are compared while the bundle's own version answers. Once deltas were applied (`version+epoch.sequence`)
        they are others, and must be probabilities, one a candidate.
        """
        answer = infer(dict(self.inputs))
        answered = np.asarray(answer.get(_VERSION, np.zeros(0, np.uint8)), np.uint8).tobytes().decode(errors="replace")
        base, learnt, _ = answered.partition("+")
        if base != self.version:
            raise BundleError(f"self-test: version '{answered}' answers in place of '{self.version}'")
        for task, expected in self.expected.items():
            scores = answer.get(task)
            if scores is None or scores.shape != expected.shape:
                shape = "no scores" if scores is None else f"scores of shape {list(scores.shape)}"
                raise BundleError(f"self-test: {shape} of task '{task}' in place of {list(expected.shape)}")
            if not ((scores >= 0) & (scores <= 1)).all():
                raise BundleError(f"self-test: scores of task '{task}' are not probabilities")
            worst = float(np.abs(scores - expected).max(initial=0.0))
            if not learnt and worst > TOLERANCE:
                raise BundleError(
                    f"self-test: scores of task '{task}' differ by up to {worst:.3g} from the in-process scorer's"
                )
        return answered
