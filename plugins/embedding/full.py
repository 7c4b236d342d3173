"""One row an id."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from engine.components import EmbeddingMethod
from engine.data.statistics import IdStatistics
from engine.hookspecs import hookimpl
from engine.placement import Own, Placement, Table
from engine.schema import FeatureSpec
from engine.tables import TableEmbedding, TableOptions, table_name


class FullEmbedding(TableEmbedding):
    """One row an id of the training split, one table a space: the reference that compression is measured against.

    Memory: (V + unknown_rows) * dim floats a space. Ids not seen in training (or seen fewer than `min_count` times)
    share `unknown_rows` rows that start at zero, so a new id begins as a neutral one.
    """

    name = "full"
    needs_statistics = True

    class Options(TableOptions):
        min_count: int = Field(1, ge=1, description="ids seen fewer times in training share the unknown rows")
        unknown_rows: int = Field(1, ge=1, description="rows that unknown ids are hashed to")

    options: Options

    def placements(self, statistics: Mapping[str, IdStatistics]) -> dict[str, Placement]:
        made: dict[str, Placement] = {}
        for feature in self.features:
            if feature.space not in made:
                ids = statistics[feature.space]
                made[feature.space] = own_rows(
                    feature, ids.fingerprints[ids.counts >= self.options.min_count], self.options.unknown_rows
                )
        return {f.name: made[f.space] for f in self.features}


def own_rows(feature: FeatureSpec, fingerprints: np.ndarray, unknown_rows: int = 1) -> Own:
    """A table with a row for each of these ids of a feature's space."""
    assert feature.dim is not None
    table = Table(table_name(feature.space), len(fingerprints) + unknown_rows, feature.dim)
    return Own(table, feature.space, fingerprints, unknown_rows)


@hookimpl
def embeddings() -> list[type[EmbeddingMethod]]:
    return [FullEmbedding]
