"""Whether models really answer: Triton's own health says 200 for one whose process is dead."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.errors import PlexrankError
from serving.triton.client import TritonClient, TritonError
from serving.triton.repository import ModelFolder
from serving.triton.selftest import FILE as SELFTEST
from serving.triton.selftest import SelfTest
from serving.triton.state import State, VersionState
from serving.triton.stubs import Stubs

log = logging.getLogger("plexrank.triton")

SECONDS = 2.0
"""That an inference of the probe has to answer."""
_HUNG = 5
"""Probes without an answer after which a model's processes are taken for hung, and killed."""
_AGAIN, _LONGEST = 1.0, 60.0
"""Seconds between two attempts to bring a version back: the first, and at most; each doubles them."""


@lru_cache(maxsize=64)  # versions come and go while this process stays
def _test_of(folder: Path, changed: int) -> SelfTest:
    return SelfTest.open(folder)


def try_version(
    client: TritonClient, folder: ModelFolder, version: str, timeout: float = SECONDS, *, whole: bool = False
) -> VersionState:
    """A real inference by one version, compared with what the in-process scorer said when it was exported.

    whole: all that were scored then, not the quick one alone. timeout: of each, in seconds. A model without
    `selftest.safetensors` has Triton's word only. TritonError where Triton does not answer or fails.
    """
    place = folder.version(version)
    try:
        test = _test_of(place, (place / SELFTEST).stat().st_mtime_ns)
    except FileNotFoundError:
        ready = client.ready(folder.name, version, timeout)
        return VersionState(ready, tested=False, fault="" if ready else "not ready by Triton's word")
    except PlexrankError as error:
        return VersionState(False, tested=False, fault=str(error))
    began = time.perf_counter()

    def infer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return client.infer(folder.name, inputs, version, timeout)

    try:
        answers = test.run_all(infer) if whole else test.run(infer)
    except TritonError:
        raise
    except PlexrankError as error:
        return VersionState(False, tested=True, fault=str(error))
    return VersionState(True, True, answers, round(time.perf_counter() - began, 4))


@dataclass
class _Trouble:
    silent: int = 0
    attempts: int = 0
    next: float = 0.0
    since: float = 0.0


class Prober:
    """Looks at all loaded versions, and brings back those whose process is dead or hung."""

    def __init__(self, client: TritonClient, stubs: Stubs, state: State) -> None:
        self._client, self._stubs, self._state = client, stubs, state
        self._repository = Path(state.repository)
        self._troubles: dict[tuple[str, str], _Trouble] = {}

    def look(self, timeout: float = SECONDS, *, first: bool = False) -> None:
        """Every loaded version answers. TritonError where the server itself does not.

        first: the whole self-test is asked, and nothing is brought back.
        """
        self._stubs.tidy()
        died = self._stubs.died()
        models: dict[str, dict[str, VersionState]] = {}
        faults: dict[str, str] = {}
        for listed in self._client.index(SECONDS):
            if listed.state == "READY":
                key = (listed.model, listed.version)
                found = self._version(*key, dead=key in died, first=first, timeout=timeout)
                models.setdefault(listed.model, {})[listed.version] = found
            elif listed.reason and listed.reason != "unloaded":
                faults[listed.model] = f"version {listed.version or '?'}: {listed.reason}"
        self._note(models, faults)

    def _version(self, model: str, version: str, *, dead: bool, first: bool, timeout: float) -> VersionState:
        folder = ModelFolder(self._repository / model)
        trouble = self._troubles.setdefault((model, version), _Trouble())
        try:
            found = try_version(self._client, folder, version, timeout, whole=first)
        except TritonError as error:
            if error.code == "NOT_FOUND":  # unloaded since the index was read
                return VersionState(False, tested=True, fault=str(error))
            trouble.silent = trouble.silent + 1 if error.code == "DEADLINE_EXCEEDED" else 0
            dead = dead or (not error.silent and "not healthy" in str(error)) or trouble.silent >= _HUNG
            found = VersionState(False, tested=True, fault=str(error))
        else:
            trouble.silent = 0
            if not dead:
                if trouble.attempts and time.monotonic() - trouble.since > _LONGEST:
                    trouble.attempts = 0
                return found
        if dead and not first and time.monotonic() >= trouble.next:
            return self._revive(folder, version, trouble, found.fault or "the process of an instance ended")
        return found

    def _revive(self, folder: ModelFolder, version: str, trouble: _Trouble, why: str) -> VersionState:
        """Loads the version again beside what is left of it. The old instances go on until the new ones answer."""
        name = f"{folder.name} version {version}"
        log.warning("%s is dead (%s): loading it again", name, why)
        self._state.fault(f"{name}: {why}")
        stubs = self._stubs.of(folder.name, version)
        if trouble.silent >= _HUNG:
            for stub in stubs:
                stub.process.send(signal.SIGKILL)
        trouble.silent = 0
        trouble.since = time.monotonic()
        trouble.next = trouble.since + min(_LONGEST, _AGAIN * 2**trouble.attempts)
        trouble.attempts += 1
        try:
            folder.touch(version)
            self._client.load(folder.name)
            self._stubs.replaced(stubs)
            found = try_version(self._client, folder, version)
        except (TritonError, OSError) as error:
            log.error(
                "%s could not be loaded again, next attempt in %.0f s: %s", name, trouble.next - trouble.since, error
            )
            return VersionState(False, tested=True, fault=f"could not be loaded again: {error}")
        self._state.revived += 1
        log.warning("%s answers again after %.1f s", name, time.monotonic() - trouble.since)
        return found

    def _note(self, models: dict[str, dict[str, VersionState]], faults: dict[str, str]) -> None:
        """Into the state; what is worse than before is logged and kept as the last fault."""
        before = {m: {v: s.fault for v, s in vs.items()} for m, vs in self._state.models.items()}
        for model, versions in models.items():
            for version, found in versions.items():
                if found.fault and found.fault != before.get(model, {}).get(version):
                    log.error("%s version %s: %s", model, version, found.fault)
                    self._state.fault(f"{model} version {version}: {found.fault}")
        for model, fault in faults.items():
            if fault != self._state.faults.get(model):
                log.error("%s: %s", model, fault)
                self._state.fault(f"{model}: {fault}")
        self._state.models, self._state.faults = models, faults
