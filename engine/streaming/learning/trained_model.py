"""What a learner trains, begun from one bundle: ranking model, calibration, rows' lifetimes, encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.batch import Batch
from engine.bundle import Bundle
from engine.config import Config
from engine.streaming.join.emitted import POSITIVE
from engine.streaming.join.ready import Examples
from engine.streaming.learning.checkpointing import Saved
from engine.streaming.learning.recalibration import Recalibration
from engine.streaming.learning.retrieval import OnlineRetrieval
from engine.streaming.learning.rows import RowLifetime
from engine.training.online import OnlineTrainer

if TYPE_CHECKING:
    from engine.catalogue import ArrowCatalogue
    from engine.plugins import Plugins


class TrainedModel:
    """trainer: the ranking model. calibration: of its logits. retrieval: the encoder; None where the bundle has none,
    or it is not to learn."""

    def __init__(self, bundle: Bundle, config: Config, plugins: Plugins, catalogue: ArrowCatalogue) -> None:
        """config: the learner's."""
        learning = config.learning
        self.bundle = bundle
        follow = config.training.calibration != "none"
        self.calibration = Recalibration(bundle.schema.tasks, bundle.calibration, learning.guard.window, follow=follow)
        self.trainer = OnlineTrainer(bundle, learning, plugins)
        self.rows = RowLifetime(bundle, learning, self.trainer)
        self.retrieval: OnlineRetrieval | None = None
        if learning.retrieval and bundle.item_vectors is not None:
            self.retrieval = OnlineRetrieval(bundle, learning, plugins)
            self.retrieval.catalogue = catalogue

    def train(self, batch: Batch, examples: Examples, now: float) -> float:
        """One step of the ranking model -> its loss. now: event time of the newest example of all."""
        return self.trainer.step(self.rows.admit(batch, now), examples.labels, examples.weight)

    def train_retrieval(
        self, examples: Examples, features: Callable[[np.ndarray], Batch], catalogue: ArrowCatalogue
    ) -> None:
        """One step of the encoder on what was liked in the ranking task. features: slots -> their batch."""
        if self.retrieval is None:
            return
        liked = (examples.labels[:, 0] == 1) & (examples.kind == POSITIVE)
        if liked.any():
            self.retrieval.step(features(examples.slot[liked]), catalogue.rows_of(examples.item[liked]))

    def items_changed(self, catalogue: ArrowCatalogue, rows: Sequence[np.ndarray]) -> None:
        """The catalogue after items' events, and the rows that they changed."""
        if self.retrieval is not None and rows:
            self.retrieval.catalogue = catalogue
            self.retrieval.touch(np.unique(np.concatenate(rows)))

    # ------------------------------------------------------------------------------------------------- state
    def tensors(self) -> dict[str, Any]:
        """Weights and optimizers' state, not copied."""
        return {**self.trainer.tensors(), **({} if self.retrieval is None else self.retrieval.tensors())}

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        return {
            "trainer": self.trainer.state(),
            "calibration": self.calibration.state(),
            "rows": self.rows.state(),
            "retrieval": {} if self.retrieval is None else self.retrieval.state(),
        }

    def load(self, saved: Saved, catalogue: ArrowCatalogue) -> None:
        """catalogue: as it was then."""
        if self.retrieval is not None:
            self.retrieval.catalogue = catalogue
        saved.read_into(self.tensors())
        self.trainer.load(saved.arrays("trainer"))
        self.calibration.load(saved.arrays("calibration"))
        self.rows.load(saved.arrays("rows"))
        if self.retrieval is not None:
            self.retrieval.load(saved.arrays("retrieval"))
