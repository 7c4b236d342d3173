"""The hashing trick, a table a space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, PositiveInt, model_validator

from engine.components import EmbeddingMethod, PluginOptions
from engine.data.statistics import IdStatistics
from engine.hookspecs import hookimpl
from engine.placement import Hashed, Placement, Table
from engine.schema import FeatureSpec
from engine.tables import TableEmbedding, TableOptions, table_name
from plugins.embedding.full import own_rows

DEFAULT_ROWS = 1 << 16
"""4 MiB of float32 at width 16: an id in a thousand collides in a vocabulary of 130."""


class HashingEmbedding(TableEmbedding):
    """Rows by hash, a table a space; with `ratio` and `collision_free_below` the fair per-feature baseline.

    row = mix(fingerprint, seed(space)) mod m. Memory: m * dim floats a space, whatever the vocabulary, and no pass over
    the data unless `ratio` or `collision_free_below` asks for one. Unknown ids read the rows that their hash names.
    """

    name = "hashing"

    class Options(TableOptions):
        rows: PositiveInt | dict[str, PositiveInt] | None = Field(
            None, description=f"rows of each table, or space -> rows; default {DEFAULT_ROWS}"
        )
        ratio: float | None = Field(None, gt=0, description="rows as a share of the space's distinct training ids")
        collision_free_below: int = Field(
            0, ge=0, description="spaces with at most so many ids keep a row an id, as small features need no hashing"
        )

        @model_validator(mode="after")
        def _one_size(self) -> Self:
            if self.ratio is not None and isinstance(self.rows, int):
                raise ValueError("give 'rows' or 'ratio', not both ('rows' as a mapping may overrule single spaces)")
            return self

    options: Options

    @classmethod
    def wants_statistics(cls, options: PluginOptions) -> bool:
        assert isinstance(options, cls.Options)
        return options.ratio is not None or options.collision_free_below > 0

    def placements(self, statistics: Mapping[str, IdStatistics]) -> dict[str, Placement]:
        made: dict[str, Placement] = {}
        for feature in self.features:
            if feature.space not in made:
                made[feature.space] = self._place(feature, statistics)
        return {f.name: made[f.space] for f in self.features}

    def _place(self, feature: FeatureSpec, statistics: Mapping[str, IdStatistics]) -> Placement:
        assert feature.dim is not None
        space, options = feature.space, self.options
        if options.collision_free_below and statistics[space].size <= options.collision_free_below:
            return own_rows(feature, statistics[space].fingerprints)
        if isinstance(options.rows, dict) and space in options.rows:
            rows = options.rows[space]
        elif options.ratio is not None:
            rows = max(1, round(options.ratio * statistics[space].size))
        else:
            rows = options.rows if isinstance(options.rows, int) else DEFAULT_ROWS
        return Hashed(Table(table_name(space), rows, feature.dim), space)


@hookimpl
def embeddings() -> list[type[EmbeddingMethod]]:
    return [HashingEmbedding]
