"""A bundle that is open: large files are mapped, not read, so that opening is quick and memory is shared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError
from torch import Tensor

from engine.bundle.manifest import Manifest, inside, read_manifest
from engine.bundle.tensors import assign, headers, load_tensors
from engine.bundle.verify import broken_files, schema_problem
from engine.catalogue import ArrowCatalogue
from engine.components import UserState
from engine.config import Config
from engine.data.encoder import FeatureEncoder
from engine.data.numeric import NumericTransforms
from engine.data.statistics import IdStatistics
from engine.errors import BundleError, SchemaError
from engine.plugins import Plugins
from engine.schema import Schema
from engine.streaming.learning.drift import Reference
from engine.training.calibration import Calibration

if TYPE_CHECKING:
    from engine.model import RankingModel
    from engine.retrieval import EncoderModel

OPTIMIZER = "optimizer.safetensors"
DRIFT = "drift.safetensors"


class Bundle:
    """`Bundle.open(path)` gives one. Parts load on first use."""

    def __init__(self, path: Path, manifest: Manifest, config: Config) -> None:
        self.path = path
        self.manifest = manifest
        self.config = config

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Bundle:
        """Checks and opens a bundle.

        verify: read every file for its sha256 and for numbers that are not finite; without it only names, lengths and
        the manifest are checked. Raises BundleError with every problem, one a line.
        """
        path = Path(path)
        manifest = read_manifest(path)
        wrong = broken_files(path, manifest, contents=verify)
        if wrong:
            raise BundleError("\n".join(wrong))
        try:
            config = Config.model_validate(manifest.config)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BundleError(f"{path}: config.{where}: {first['msg']}: written by another plexrank?") from None
        problem = schema_problem(config, manifest.schema_)
        if problem:
            raise BundleError(f"{path}: {problem}; train again")
        return cls(path, manifest, config)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    @cached_property
    def schema(self) -> Schema:
        return self.config.schema_()

    @cached_property
    def statistics(self) -> dict[str, IdStatistics]:
        """space -> distinct fingerprints and counts of the training split; only where the model needs them."""
        tensors = self._tensors("statistics.safetensors")
        spaces = [k.removesuffix(".fingerprints") for k in tensors if k.endswith(".fingerprints")]
        try:
            return {s.removeprefix("space."): IdStatistics.from_tensors(tensors, s) for s in spaces}
        except KeyError as error:
            raise BundleError(f"{self.path}: statistics.safetensors: tensor {error} is missing") from None

    @cached_property
    def item_counts(self) -> np.ndarray:
        """int64 [items]: positives of the training split, by catalogue row."""
        return self._item_column("item_counts")

    @cached_property
    def item_latest(self) -> np.ndarray:
        """int64 [items]: time of the newest event, 0 for none, by catalogue row."""
        return self._item_column("item_latest")

    @cached_property
    def numeric(self) -> NumericTransforms:
        return NumericTransforms.from_tensors(self._tensors("features.safetensors"))

    @cached_property
    def encoder(self) -> FeatureEncoder:
        """Raw values to `Batch`, as in training."""
        missing = [f.name for f in self.schema.features if f.kind == "numeric" and f.name not in self.numeric]
        if missing:
            raise BundleError(f"{self.path}: features.safetensors: no transform for {', '.join(missing)}")
        return FeatureEncoder(self.schema, self.numeric)

    @cached_property
    def catalogue(self) -> ArrowCatalogue:
        try:
            return ArrowCatalogue.open(self.path / "catalogue")
        except SchemaError as error:
            raise BundleError(f"{self.path}: catalogue: {error}") from error

    @cached_property
    def calibration(self) -> dict[str, Calibration]:
        """task -> map from logits to probabilities."""
        tensors = self._tensors("calibration.safetensors")
        return {task: Calibration.from_tensors(tensors, f"{task}.") for task in self.schema.tasks}

    @cached_property
    def drift(self) -> Reference | None:
        """How training values fall into buckets; None in a bundle that keeps no such figures: drift is not judged."""
        if DRIFT not in self.manifest.files:
            return None
        try:
            return Reference.from_tensors(self._tensors(DRIFT), self.schema)
        except BundleError as error:
            raise BundleError(f"{self.path}: {error}; train again") from None

    @cached_property
    def item_vectors(self) -> np.ndarray | None:
        """float32 [items, D] by catalogue row, mapped; None without an encoder."""
        if "vectors.safetensors" not in self.manifest.files:
            return None
        vectors = self._tensors("vectors.safetensors").get("vectors")
        if vectors is None or len(vectors) != len(self.catalogue):
            raise BundleError(f"{self.path}: vectors.safetensors: not one vector an item of the catalogue")
        return vectors.numpy()

    def model(self, plugins: Plugins) -> RankingModel:
        """The ranking model, frozen, its weights mapped from the file (built on `meta`, then assigned)."""
        from engine.model import build_model

        device = torch.device("meta")
        model = build_model(self.config, self.statistics, plugins, frozen=True, device=device)
        assign(model, self._tensors("model.safetensors"), f"{self.path}: model.safetensors")
        return model

    def encoder_model(self, plugins: Plugins) -> EncoderModel | None:
        """The retrieval encoder, frozen, mapped; None where the configuration has none."""
        if "retrieval.safetensors" not in self.manifest.files:
            return None
        from engine.retrieval import build_encoder_model

        device = torch.device("meta")
        model = build_encoder_model(self.config, self.statistics, plugins, frozen=True, device=device)
        assign(model, self._tensors("retrieval.safetensors"), f"{self.path}: retrieval.safetensors")
        return model

    def frozen_tensors(self) -> dict[str, Tensor]:
        """The ranking model's tensors by their names in the frozen form, mapped where they are large."""
        return self._tensors("model.safetensors")

    def optimizer(self) -> dict[str, Tensor] | None:
        """The optimizers' state that training left (`TrainStep.optimizer_state`); None if it was not kept."""
        if OPTIMIZER not in self.manifest.files:
            return None
        state = self._tensors(OPTIMIZER)
        rows = {n: s[0] for n, (_, s) in headers(inside(self.path, "model.safetensors")).items() if s}
        for name, sums in state.items():
            table = name.removeprefix("tables/")
            if table != name and sums.shape != (rows.get(f"embedding.weights.{table}"),):
                raise BundleError(f"{self.path}: {OPTIMIZER}: {name} has not one sum a row of its table; train again")
        return state

    def users(self) -> Iterator[UserState]:
        """What was known of each user after all data; nothing if the bundle was written without users."""
        if "users.arrow" not in self.manifest.files:
            return
        try:
            with pa.memory_map(str(inside(self.path, "users.arrow"))) as source, pa.ipc.open_file(source) as file:
                for number in range(file.num_record_batches):
                    for row in file.get_batch(number).to_pylist():
                        yield UserState(
                            user=row["user"],
                            features=json.loads(row["features"]),
                            history=row["history"],
                            times=row["times"],
                            seen=row["seen"],
                        )
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise BundleError(f"{self.path}: users.arrow: {error}") from error

    def check_parts(self) -> None:
        """Loads every part that needs no plugin; BundleError for the first that does not fit."""
        for counts in (self.item_counts, self.item_latest):
            if len(counts) != len(self.catalogue):
                raise BundleError(f"{self.path}: statistics.safetensors: not one count an item of the catalogue")
        _ = self.encoder, self.calibration, self.item_vectors, next(self.users(), None), self.optimizer()
        _ = self.drift

    def _tensors(self, name: str) -> dict[str, Tensor]:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name}: missing; train again")
        return load_tensors(inside(self.path, name))

    def _item_column(self, name: str) -> np.ndarray:
        column = self._tensors("statistics.safetensors").get(name)
        if column is None or column.dtype != torch.int64:
            raise BundleError(f"{self.path}: statistics.safetensors: no int64 tensor {name}")
        return column.numpy()

    def __repr__(self) -> str:
        return f"Bundle({self.name} {self.version} at {self.path})"


def summary(bundle: Bundle) -> dict[str, Any]:
    """name, version and parent: what answers and logs say of a model."""
    return {"name": bundle.name, "version": bundle.version, "parent": bundle.manifest.parent}
