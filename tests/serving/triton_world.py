"""What tests of exported models share: bundles with every kind of feature, and threads that ask a Triton."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from engine.bundle import Bundle, write_bundle
from engine.bundle.manifest import FileEntry, read_manifest, sealed
from engine.bundle.tensors import load_tensors, save_tensors
from engine.components import ScoreRequest
from engine.config import Config
from engine.data.prepare import Prepared
from engine.files import sha256
from engine.inference.signature import VERSION
from engine.inference.tensors import encode
from engine.plugins import Plugins
from plugins.scorers.inproc import InprocScorer
from serving.triton.client import TritonClient
from tests.inference.rich_world import CALIBRATION, sharp_model

Asked = tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]
"""Tensors, and by the version that answers what each task must be."""


def bundle_of(config: Config, prepared: Prepared, plugins: Plugins, path: Path) -> Path:
    """Of a model that nobody trained, whose scores are sharp."""
    model = sharp_model(config, prepared, plugins)
    calibration = {task: CALIBRATION[task] for task in config.schema_().tasks}
    write_bundle(
        path, config=config, model=model, prepared=prepared, calibration=calibration, metrics={}, plugins=plugins
    )
    return path


def another(bundle: Path, path: Path, seed: int) -> Path:
    """The same with other tables, and a version of its own."""
    shutil.copytree(bundle, path)
    file = path / "model.safetensors"
    state = load_tensors(file)
    torch.manual_seed(seed)
    state |= {n: t + torch.randn_like(t) * t.std() for n, t in state.items() if n.startswith("embedding.weights.")}
    file.unlink()
    save_tensors(file, state)
    manifest = read_manifest(path).as_json()
    manifest["files"]["model.safetensors"] = FileEntry(sha256=sha256(file), bytes=file.stat().st_size).model_dump()
    del manifest["digest"], manifest["format"]
    manifest["version"] = f"{seed:012x}"
    (path / "manifest.json").write_text(json.dumps(sealed(manifest).as_json()))
    return path


def scorer_of(bundle: Path) -> InprocScorer:
    scorer = InprocScorer(InprocScorer.Options())
    scorer.load(bundle)
    return scorer


def asked(bundle: Path, requests: Sequence[ScoreRequest], scorers: Sequence[InprocScorer]) -> list[Asked]:
    """The requests as tensors, with the answers of these scorers to the raw values."""
    opened = Bundle.open(bundle, verify=False)
    return [
        (
            encode(request, opened.encoder, opened.catalogue, items_apart=False),
            {scorer.version: scorer.score(request).tasks for scorer in scorers},
        )
        for request in requests
    ]


def answered(answer: Mapping[str, np.ndarray]) -> str:
    return answer[VERSION].tobytes().decode()


def differs(answer: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """By how much at most; infinite where a task or a score is missing."""
    if any(answer[task].shape != values.shape for task, values in expected.items()):
        return np.inf
    return max(float(np.abs(answer[task] - values).max(initial=0.0)) for task, values in expected.items())


class Load:
    """Threads that ask Triton from enter to exit, naming no version; what each answer was is counted.

    check: says of a request's number and its answer what is wrong, or nothing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tensors: Sequence[Mapping[str, np.ndarray]],
        check: Callable[[int, Mapping[str, np.ndarray]], str] = lambda number, answer: "",
        threads: int = 3,
    ) -> None:
        self.wrong: list[str] = []
        self.versions: Counter[str] = Counter()
        self.seen: list[str] = []
        self._model, self._tensors, self._check = model, tensors, check
        self._client = TritonClient(url)
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(threads)]

    def _ask(self, first: int) -> None:
        number = first
        while not self._end.wait(0.005):
            number = (number + 1) % len(self._tensors)
            try:
                answer = self._client.infer(self._model, self._tensors[number], timeout=20.0)
                wrong = self._check(number, answer)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            else:
                version = answered(answer)
                self.versions[version] += 1
                if first == 0:
                    self.seen.append(version)
            if wrong:
                self.wrong.append(wrong)

    def wait_for(self, version: Callable[[str], bool], seconds: float = 60.0) -> None:
        """Until an answer of such a version was given."""
        until = time.monotonic() + seconds
        while not any(map(version, list(self.versions))):
            assert time.monotonic() < until, f"never answered; {self.versions}, wrong: {self.wrong[:3]}"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
