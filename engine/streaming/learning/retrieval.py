"""The encoder that finds candidates goes on learning from the stream's positives, and its items' vectors follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from engine.batch import Batch
from engine.config_learning import LearningConfig
from engine.errors import BundleError, CheckpointError, ConfigError
from engine.retrieval import EncoderModel, item_batch
from engine.streaming.deltas.delta import ItemVectors, TableRows
from engine.streaming.deltas.encoder_delta import DENSE, TABLE
from engine.tables import TableEmbedding
from engine.training.distributed import join
from engine.training.retrieval_step import RetrievalStep

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.catalogue import ArrowCatalogue
    from engine.plugins import Plugins

REFRESH = 100
"""Steps between two looks of the sampler at the counts of items."""
MEMORY = 50_000.0
"""Positives in which a count of items halves: how often an item is drawn of late is what log q corrects for."""

_MET, _LIKED = 1, 2
_ITEMS = 8192
_SCALE = 1024  # counts that decayed, for a sampler that takes whole numbers


class OnlineRetrieval:
    """A bundle's encoder under the same TorchRec code as in batch training, in one process.

    Negatives are the other positives of a batch and what the configured sampler draws; log q follows from running
    counts, the bundle's at first. Random numbers follow from the number of the step. For one thread.
    Adagrad and Adam begin anew: with the sums that training left, recall after users had moved on to other tastes came
    back more slowly (0.37 in place of 0.6 in the tests' world), and where nothing moves it made no difference.
    catalogue: the items; set another one, with more rows, where items are added.
    """

    def __init__(self, bundle: Bundle, learning: LearningConfig, plugins: Plugins) -> None:
        """ConfigError where `learning.retrieval` is off; BundleError for a bundle whose encoder cannot go on."""
        if not learning.retrieval:
            raise ConfigError("learning.retrieval is false: the encoder does not learn from the stream")
        world = join()
        if world.size > 1:
            raise ConfigError("learning from the stream runs in one process; share partitions out among several")
        frozen, vectors = bundle.encoder_model(plugins), bundle.item_vectors
        if frozen is None or vectors is None:
            raise BundleError(f"{bundle.path}: it has no encoder to go on learning: set learning.retrieval: false")
        if vectors.ndim != 2:
            raise ConfigError("an encoder of several vectors an item does not learn: set learning.retrieval: false")
        self.steps = 0
        self.device = world.device
        self._path, self._encoder, self._schema = bundle.path, bundle.encoder, bundle.schema
        self._catalogue = bundle.catalogue
        self.core = RetrievalStep(bundle.config, bundle.statistics, plugins, world, 1)
        method = self.core.method
        self._tables: dict[str, Tensor] = {}
        if isinstance(method, TableEmbedding):
            self._tables = {n: w[:, : method.tables[n].dim] for n, w, _ in method.local_weights()}
        self._touched = {name: np.zeros(len(weight), dtype=bool) for name, weight in self._tables.items()}
        self._fill(frozen.state_dict())
        self._sent = self.dense()
        counts = bundle.item_counts.astype(np.float64)
        self._counts = counts * min(1.0, MEMORY / max(1.0, counts.sum()))
        self._fresh = np.zeros(len(counts), np.int64)  # positives since the sampler looked
        self._level = np.zeros(len(counts), np.uint8)
        self._cursor, self._behind = 0, 0  # where refreshing goes on, and how many vectors are behind the towers
        self._sampler = self.core.sampler(self._whole_counts())

    @torch.no_grad()
    def _fill(self, frozen: Mapping[str, Tensor]) -> None:
        for name, weight in self._tables.items():
            weight.copy_(self._fitting(f"embedding.weights.{name}", frozen, weight))
        for name, value in self.core.model.state_dict().items():
            if not isinstance(value, ShardedTensor):
                value.copy_(self._fitting(name, frozen, value))

    def _fitting(self, name: str, frozen: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
        found = frozen.get(name)
        if found is None or found.shape != wanted.shape:
            raise BundleError(
                f"{self._path}: its encoder cannot be trained further: its frozen form lacks tensor {name} of shape "
                f"{tuple(wanted.shape)}; set learning.retrieval: false"
            )
        return found

    # ---------------------------------------------------------------------------------------------- training
    @property
    def catalogue(self) -> ArrowCatalogue:
        return self._catalogue

    @catalogue.setter
    def catalogue(self, catalogue: ArrowCatalogue) -> None:
        """Rows keep their numbers; new ones, behind them, count as touched: their vectors are due."""
        more = len(catalogue) - len(self._level)
        if more < 0:
            raise ValueError(f"the catalogue lost {-more} items; rows must keep their numbers")
        self._catalogue = catalogue
        if more:
            self._lengthen(more)
            self._sampler = self.core.sampler(self._whole_counts())

    def _lengthen(self, more: int) -> None:
        """For so many new items."""
        self._level = np.append(self._level, np.full(more, _LIKED, np.uint8))
        self._counts = np.append(self._counts, np.zeros(more))
        self._fresh = np.append(self._fresh, np.zeros(more, np.int64))

    def step(self, batch: Batch, rows: np.ndarray) -> float:
        """One optimizer step on positives -> the loss, in nats; 0 where there is nothing to learn.

        batch: B users with their features (U = N = B; what it says of its targets is not read). rows int64 [B]: the
        catalogue's rows of what they liked, -1 where the catalogue does not list it (such a row teaches nothing).
        """
        known = rows >= 0
        if not known.any():
            return 0.0
        self.core.sharded.train()
        self._sampler.reseed(self.core.seed(self.steps))
        sampled = self.core.sample(batch, torch.from_numpy(rows), self._sampler, self._encoder, self._catalogue)
        loss = self.core(sampled, self.steps)
        self.steps += 1
        self._fresh += np.bincount(rows[known], minlength=len(self._fresh))
        if self.steps % REFRESH == 0:
            self._counts = self._counts * 0.5 ** (self._fresh.sum() / MEMORY) + self._fresh
            self._fresh[:] = 0
            self._sampler = self.core.sampler(self._whole_counts())
        self._mark(sampled.batch, sampled.items.numpy(), rows[known])
        return loss

    def _whole_counts(self) -> np.ndarray:
        return np.rint(self._counts * _SCALE).astype(np.int64)

    def _mark(self, batch: Batch, met: np.ndarray, liked: np.ndarray) -> None:
        """Which table rows, and which items' vectors, a step has moved."""
        if self._tables:
            for table, rows in self.core.method.touched_rows(batch.ids).items():
                self._touched[table][rows.cpu().numpy()] = True
        parts = batch.jagged()
        past = [parts[s.name].values().numpy() for s in self._schema.sequences if self._lists_items(s.of)]
        seen = self._catalogue.rows_of(np.concatenate(past)) if past else np.empty(0, np.int64)
        for items, level in ((met, _MET), (seen[seen >= 0], _MET), (liked, _LIKED)):
            self._level[items] = np.maximum(self._level[items], level)
        self._behind = len(self._level)

    def _lists_items(self, name: str) -> bool:
        feature = self._schema[name]
        return feature.kind == "categorical" and feature.side == "item" and feature.column == self._schema.item

    # -------------------------------------------------------------------------------------- what has changed
    def touched_items(self) -> np.ndarray:
        """Catalogue rows int64, ascending, whose own embedding rows changed since their vectors were last taken."""
        return np.flatnonzero(self._level)

    def touch(self, rows: np.ndarray) -> None:
        """Catalogue rows int64 [n] of items whose features changed: their vectors are due."""
        self._level[rows] = _LIKED

    @torch.no_grad()
    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Vectors float32 [m, D] of catalogue rows int64 [m], as the encoder makes them now."""
        self.core.sharded.eval()
        parts = [
            self.core.model.items(
                item_batch(self._encoder, self._catalogue, rows[start : start + _ITEMS]).to(self.device)
            ).cpu()
            for start in range(0, len(rows), _ITEMS)
        ]
        return torch.cat(parts).numpy() if parts else np.empty((0, self.core.model.output_dim), np.float32)

    def take_vectors(self, most: int = 2000) -> ItemVectors | None:
        """At most so many items' vectors for a delta; None where none is behind.

        First items that were liked or are new, then those that were met (as negatives, in histories), then the rest in
        turn: a step moves the towers, and so all vectors a little.
        """
        rows = self._due(most)
        if not len(rows):
            return None
        self._level[rows] = 0
        return ItemVectors(self._catalogue.ids(rows), self.vectors(rows))

    def _due(self, most: int) -> np.ndarray:
        liked = np.flatnonzero(self._level == _LIKED)
        if len(liked) >= most:
            return liked[:most]
        met = np.flatnonzero(self._level == _MET)
        met = np.concatenate([met[met >= self._cursor], met[met < self._cursor]])[: most - len(liked)]
        chosen = np.concatenate([liked, met])
        rest = min(most - len(chosen), self._behind)
        if rest > 0:
            turn = (self._cursor + np.arange(rest)) % len(self._level)
            chosen = np.concatenate([chosen, turn[self._level[turn] == 0]])
            self._cursor, self._behind = int((turn[-1] + 1) % len(self._level)), self._behind - rest
        return np.sort(chosen)

    def take_delta(self, *, dense: bool = True) -> tuple[dict[str, TableRows], dict[str, Tensor]]:
        """The encoder's touched rows and, with `dense`, its dense tensors that changed since they were last taken, by
        their names in a delta (`engine.streaming.deltas.encoder_delta`). What was taken counts as touched no more."""
        tables = {}
        for name, touched in self._touched.items():
            rows = np.flatnonzero(touched)
            if len(rows):
                tables[TABLE + name] = TableRows(rows, self._rows(name, rows))
                touched[:] = False
        if not dense:
            return tables, {}
        now = self.dense()
        changed = {DENSE + name: value for name, value in now.items() if not torch.equal(value, self._sent[name])}
        self._sent = now
        return tables, changed

    @torch.no_grad()
    def _rows(self, table: str, rows: np.ndarray) -> np.ndarray:
        return self._tables[table][torch.from_numpy(rows).to(self.device)].cpu().numpy()

    def dense(self) -> dict[str, Tensor]:
        """All of the frozen encoder's tensors that are no tables, by their names there; copies, on the CPU."""
        parts: dict[str, nn.Module] = {"encoder": self.core.model.encoder}
        if not self._tables:
            parts["embedding"] = self.core.method.freeze()
        return {
            f"{part}.{name}": value.detach().to("cpu", copy=True)
            for part, module in parts.items()
            for name, value in module.state_dict().items()
        }

    # --------------------------------------------------------------------------------------------- as a whole
    def frozen(self) -> EncoderModel:
        """The form that is stored and served; tables may share memory with the trained ones."""
        return self.core.model.freeze()

    def tensors(self) -> dict[str, Any]:
        """Weights and optimizers' state, not copied, under `retrieval/`: with `state` all that a checkpoint holds."""
        return {f"retrieval/{name}": value for name, value in self.core.tensors().items()}

    def state(self) -> dict[str, np.ndarray]:
        """The rest of the checkpoint: steps, counts, whose vectors are due, and the dense part as it was last taken."""
        return {
            "numbers": np.array([self.steps, self._cursor, self._behind], np.int64),
            "counts": self._counts.copy(),
            "fresh": self._fresh.copy(),
            "level": self._level.copy(),
            **{f"touched/{name}": np.flatnonzero(seen) for name, seen in self._touched.items()},
            **{f"sent/{name}": value.numpy() for name, value in self._sent.items()},
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes `state` up; the weights were read into `tensors` before, and the catalogue set to what it was then.

        Items behind those that it knew came before the bundle was published, and after the checkpoint.
        """
        more = len(self._catalogue) - len(state["level"])
        if more < 0:
            raise CheckpointError(
                f"retrieval: the checkpoint knows {len(state['level']):,} items, the catalogue {len(self._catalogue):,}"
            )
        self.steps, self._cursor, self._behind = state["numbers"].tolist()
        self._counts, self._fresh, self._level = state["counts"].copy(), state["fresh"].copy(), state["level"].copy()
        self._lengthen(more)
        for name, seen in self._touched.items():
            seen[:] = False
            seen[state[f"touched/{name}"]] = True
        self._sent = {name: torch.from_numpy(np.array(state[f"sent/{name}"])) for name in self._sent}
        self._sampler = self.core.sampler(self._whole_counts())
