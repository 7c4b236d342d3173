"""What an instance of an exported model runs: the bundle over live memory, kept fresh beside the requests."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from engine.bundle import Bundle
from engine.inference.runtime import Answer, Runtime, Tensors
from engine.memory import keep_freed_memory
from serving.triton.layout import BUNDLE, live_root
from serving.triton.selftest import SelfTest
from serving.triton.variant import Variant

log = logging.getLogger("plexrank.triton")

REFRESH_SECONDS = 0.02
SWITCH_SECONDS = 0.0005
"""Longest time that the refreshing thread keeps the interpreter while a request waits for it."""


class Hosted:
    """One instance. `score` never raises for a request that is wrong; the others of its batch are answered."""

    def __init__(self, version: Path, live: Path, *, item_vectors_mb: int, threads: int) -> None:
        """version: the folder with `bundle` and the self-test, which is asked before anybody else is; live: of its own.

        PlexrankError where the bundle or the live memory cannot be read, or scores are not those of the in-process
        scorer.
        """
        keep_freed_memory()
        torch.set_num_threads(threads)
        bundle = Bundle.open(version / BUNDLE, verify=False)
        self._live = Variant.read(version).open(version, live, bundle, item_vectors_mb)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="plexrank-refresh", daemon=True)
        self._thread.start()
        try:
            self._runtime = Runtime(lambda: self._live.now)
            test = SelfTest.open(version)
            for _ in range(2):
                test.run_all(self._runtime.infer)
        except BaseException:
            self.close()
            raise

    @classmethod
    def started(cls, args: Mapping[str, str]) -> Self:
        """As the python backend asks for it; takes the whole process to be its own. args: of `initialize`."""
        import json

        said = {k: v["string_value"] for k, v in json.loads(args["model_config"]).get("parameters", {}).items()}
        model = Path(args["model_repository"])
        live = live_root(model.parent, said.get("live", "")) / args["model_name"] / args["model_version"]
        sys.setswitchinterval(SWITCH_SECONDS)
        hosted = cls(
            model / args["model_version"],
            live,
            item_vectors_mb=int(said["item_vectors_mb"]),
            threads=int(said["threads"]),
        )
        gc.collect()
        gc.freeze()  # what was loaded stays: the collector need not walk it between requests
        log.info("process %d scores with %s, from %s", os.getpid(), hosted.version, live)
        return hosted

    @property
    def version(self) -> str:
        return self._live.version

    def score(self, requests: Sequence[Tensors]) -> list[Answer]:
        """As `Runtime.score`."""
        return self._runtime.score(requests)

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            self._live.refresh()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10.0)
        self._live.close()
