"""What tests of live memory share: scores of a view, deltas of all kinds, forked processes."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.components import ScoreRequest
from engine.inference.live import LiveModel
from engine.inference.live_view import LiveView
from engine.streaming.deltas.delta import Delta, TableRows
from engine.training.calibration import Calibration
from plugins.scorers.inproc import InprocScorer
from tests.scorers.conftest import REQUESTS, delta, drawn


def scores(view: LiveView, request: ScoreRequest) -> np.ndarray:
    """Of task `liked`, by the quick way where it answers."""
    with torch.inference_mode():
        logits = view.items.logits(request) if view.items is not None else None
        if logits is None:
            logits = view.model(view.encoder.encode_request(request, view.catalogue))
    return view.calibration["liked"].apply(logits["liked"].numpy())


def check_equal(live: LiveModel, scorer: InprocScorer) -> None:
    """Version and scores, to the last bit."""
    view = live.now
    assert view.version == scorer.version
    for request in REQUESTS:
        found, wanted = scores(view, request), scorer.score(request).tasks["liked"]
        np.testing.assert_array_equal(found, wanted, strict=True)


def rows_of(weights: dict[str, Tensor], seed: int) -> dict[str, TableRows]:
    """About a third of each table's rows, drawn anew."""
    found = {}
    for at, name in enumerate(sorted(weights)):
        if name.startswith("embedding.weights."):
            table = weights[name]
            some = np.random.default_rng([seed, at]).choice(len(table), max(1, len(table) // 3), replace=False)
            found[name.removeprefix("embedding.weights.")] = drawn(table, some.tolist(), seed)
    return found


def dense_of(weights: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in weights.items() if name.startswith(("ranker.", "interest."))}


def platt(slope: float, offset: float) -> dict[str, Tensor]:
    """A calibration as it lies in a delta."""
    knots = np.array([offset, slope + offset], np.float32)
    return Calibration("platt", np.array([0, 1], np.float32), knots, slope).to_tensors("calibration.liked.")


def chain(bundle: Path, weights: dict[str, Tensor], count: int, epoch: int = 0) -> list[Delta]:
    """Deltas 1..count: rows in each, every second with a dense part, every third with a calibration."""
    return [
        delta(
            bundle,
            n,
            epoch=epoch,
            tables=rows_of(weights, 100 * epoch + n),
            dense=(dense_of(weights, 1 + n / 50) if n % 2 == 0 else {})
            | (platt(1 + n / 10, n / 20) if n % 3 == 0 else {}),
        )
        for n in range(1, count + 1)
    ]


def scored(scorer: InprocScorer, deltas: Iterable[Delta]) -> InprocScorer:
    for one in deltas:
        scorer.apply(one)
    return scorer


def fork(body: Callable[[], object]) -> int:
    """A process that does this and ends: with 0, with 1 where it raised, or by what kills it."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it goes with this process
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        torch.set_num_threads(1)
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """The exit status, negative: the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
